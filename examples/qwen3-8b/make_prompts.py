"""MATH as the hub has it (columns problem and solution) -> rows that train reads: make_prompts.py FOLDER > prompts.jsonl"""

import json
import sys

from lens_megatron.data.files import read_files
from lens_megatron.rewards.extract import boxed

for _, row in read_files(sys.argv[1], "train"):
    answer = boxed(row["solution"])
    if answer:  # a problem without one can never be solved: LENS would try to rescue it for ever
        print(json.dumps({"prompt": row["problem"], "answer": answer, "source": "math"}))
