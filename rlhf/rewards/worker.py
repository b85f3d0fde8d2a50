# TEMPORARY
from typing import NamedTuple
class Score(NamedTuple):
    value: float
    failed: bool
class Rewards:
    def __init__(self, *a): pass
    def __enter__(self): return self
    def __exit__(self, *a): pass
    def score(self, items):
        return [Score(float(r.split("####")[-1].strip() == rec["answer"]), False) for p, r, rec in items]
