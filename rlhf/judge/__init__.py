"""Language models that grade responses (LLM-as-a-judge, 2306.05685), at OpenAI-compatible endpoints."""
