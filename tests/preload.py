"""Preload the modules of the fork server of tests/warm.py, with the environment variables that libraries read."""
# ruff: noqa: F401

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")

import pytest  # a forked process imports the main module of its parent, which is pytest
import torch._inductor.compile_fx
import torch.utils.tensorboard.writer

import dist_llm.generation
import dist_llm.training.evaluate_checkpoint
import dist_llm.training.run
import tests.laws.law

gc.freeze()
