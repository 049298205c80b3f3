"""The fork server of fork_server.py imports this module, and with it the modules that most test processes need.

Libraries read the environment variables when they are imported, so the variables are set first.
"""
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

gc.freeze()  # the garbage collector of a forked process skips these objects, so their memory pages stay shared
