"""MT-Bench (2306.05685) without a model: its questions, answers, judgments and tables, in the files of FastChat."""
