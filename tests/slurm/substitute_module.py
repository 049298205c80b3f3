"""Run Python with another module in place of `dist_llm`: `python substitute_module.py MODULE,ARG,... ARGUMENTS`.

In ARGUMENTS, which are those of a Python command, the word `dist_llm` is replaced by MODULE ARG ... For example,

    python substitute_module.py tests.e2e.run_slowly,0.5 -m dist_llm train --config config.yaml

runs `python -m tests.e2e.run_slowly 0.5 train --config config.yaml`. So a test can run the batch scripts of dist_llm,
which start `$PYTHON -m dist_llm`, with slow or faulty steps.
"""

import os
import sys

replacement, *arguments = sys.argv[1:]
index = arguments.index("dist_llm")
arguments[index : index + 1] = replacement.split(",")
os.execv(sys.executable, [sys.executable, *arguments])
