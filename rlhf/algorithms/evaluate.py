"""Mode evaluate (see rlhf.evaluate): an engine answers held-out prompts with the weights of a folder. Nothing is trained."""

from rlhf.contracts import Algorithm


class Evaluate(Algorithm):
    summary = "generate with the engine from a Hugging Face folder and score the responses"
    form = "prompts"
    trains = False
    online = True
    rule = "math"
