"""Explain why the math verifier (reward.function=math) accepts a response or not.

python tools/explain_answer.py ANSWER RESPONSE

ANSWER is the answer of the record. RESPONSE is the whole response of a model. "-" instead of one of them reads it from
standard input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf.rewards.explanation import explain


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments == ["-", "-"]:
        print(__doc__)
        return 2
    answer, response = (sys.stdin.read() if argument == "-" else argument for argument in arguments)
    print("\n".join(explain(response, answer)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
