"""Run in a process of its own, in a clone of the authors' code: call its prompt builders and write down what they say.

Not imported by the package. On stdin comes what to call, on a file named there goes what was returned:

    {"module": "/clone/prompts.py", "answer": "/tmp/x.json",
     "constants": ["FEEDBACK_SLOT"], "calls": [{"function": "build_x", "arguments": {"question": "..."}}]}

A function is given those of the arguments that it takes. It knows nothing of what the texts are for.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path


def main() -> None:
    """Import the module, make the calls, write the answers."""
    asked = json.load(sys.stdin)
    module_file = Path(asked["module"])
    sys.path.insert(0, str(module_file.parent))
    module = importlib.import_module(module_file.stem)
    constants = {name: getattr(module, name, None) for name in asked["constants"]}
    returned: list[dict[str, str]] = []
    for call in asked["calls"]:
        function = getattr(module, call["function"], None)
        if function is None:
            returned.append({})
            continue
        taken = inspect.signature(function).parameters
        arguments = {name: value for name, value in call["arguments"].items() if name in taken}
        returned.append({"text": str(function(**arguments))})
    Path(asked["answer"]).write_text(json.dumps({"constants": constants, "returned": returned}), encoding="utf-8")


if __name__ == "__main__":
    main()
