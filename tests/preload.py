"""What the server of tests/warm.py has imported, and the settings that libraries read as they are imported."""
# ruff: noqa: F401

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")

import pytest  # each process imports the main module of the one that asked for it
import torch._inductor.compile_fx
import torch.utils.tensorboard.writer

import dist_llm.generate
import dist_llm.train.run
import dist_llm.train.score
import tests.laws.law

gc.freeze()
