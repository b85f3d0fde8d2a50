"""Mode mtbench (2306.05685): an engine answers questions of two turns, and then a judge grades the answers."""

from rlhf.contracts import Algorithm


class MTBench(Algorithm):
    summary = "answer the questions of MT-Bench with the engine, and let a judge grade the answers"
    form = "questions"
    defaults = {"data.max_tokens": 4096, "rollout.max_tokens": 1024}
    trains = False
    online = True
    judged = True
