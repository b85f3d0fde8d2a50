"""Mode evaluate (see rlhf.evaluate): an engine with the weights of a folder answers held-out prompts. No training."""

from rlhf.contracts import Algorithm


class Evaluate(Algorithm):
    summary = "generate with the engine from a Hugging Face folder and score the responses"
    form = "prompts"
    trains = False
    online = True
    rule = "math"
