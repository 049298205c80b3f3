"""Modules that the fork server of tests/warm.py imports, and environment variables that libraries read at import."""
# ruff: noqa: F401

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")

import pytest  # each forked process imports the main module of the process that requested it
import torch._inductor.compile_fx
import torch.utils.tensorboard.writer

import dist_llm.generation
import dist_llm.training.evaluate_checkpoint
import dist_llm.training.run
import tests.laws.law

gc.freeze()
