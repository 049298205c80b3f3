"""`python instead.py WORDS ARGUMENTS`: python, but that where it is told to run dist_llm it runs WORDS."""

import os
import sys

words, *arguments = sys.argv[1:]
place = arguments.index("dist_llm")
arguments[place : place + 1] = words.split(",")
os.execv(sys.executable, [sys.executable, *arguments])
