"""`dist-llm convert`: its actions and their arguments."""

import argparse
from collections.abc import Callable

from dist_llm.commands.call_function import call_function

DESCRIPTION = """\
Convert checkpoints to and from other formats, compare them and inspect them.

Give a run to use its newest checkpoint. The output appears when it is complete: it is written to a temporary path, read
back, compared, and renamed. to-deepspeed compares after the rename, so after an error remove its output. The loss of
the probe batch (docs/checkpoints.md) is recomputed and compared. One tensor at a time is in memory; the probe holds the
head, or one block, or the embedding; to-torch and --check load the full model.
No GPU and no process group are needed. A converted checkpoint can be evaluated, sampled, and trained on with init_from.
"""

EPILOG = """\
examples:
  dist-llm convert to-hf runs/demo hf/demo --check
  dist-llm convert from-hf hf/demo checkpoints/demo --check
  dist-llm convert inspect runs/demo
  dist-llm convert list-families

Exit code 0: success. 1: diff found a difference. 2: a user error, or inspect or verify found a damaged checkpoint.
"""

AddAction = Callable[..., argparse.ArgumentParser]  # (name, module, help text, operands) -> the action's parser
CHECK = "compare logits with those of transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `dist-llm convert`. Each names the function to call, as `module:function`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    def add_action(name: str, module: str, help_text: str, *operands: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        for operand in operands:
            action.add_argument(operand, metavar=operand.upper(), nargs="+" if operand == "checkpoints" else None)
        action.set_defaults(function=f"dist_llm.commands.{module}:{name.replace('-', '_')}")
        return action

    _add_huggingface(add_action)
    _add_other_formats(add_action)
    _add_comparisons(add_action)


def _add_huggingface(add_action: AddAction) -> None:
    action = add_action(
        "to-hf", "convert_hf", "write a directory for from_pretrained, with the tokenizer", "checkpoint", "out"
    )
    action.add_argument("--family", default="", help="one of list-families; default: the first that fits")
    action.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    action.add_argument("--no-tokenizer", action="store_true", help="write the weights and config.json only")
    action.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size limit of a file; default: 5")
    action.add_argument("--check", action="store_true", help=CHECK)

    action = add_action(
        "from-hf",
        "convert_hf",
        "read safetensors or pytorch_model.bin of a family that list-families prints",
        "directory",
        "out",
    )
    action.add_argument("--check", action="store_true", help=CHECK)
    action.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="an unknown field of config.json that does not change what the model computes; repeatable",
    )
    add_action("list-families", "list_families", "list the families of Hugging Face that to-hf and from-hf support")


def _add_other_formats(add_action: AddAction) -> None:
    add_action("to-torch", "convert_torch", "write one file of torch.save", "checkpoint", "out")
    add_action("from-torch", "convert_torch", "read a file that to-torch wrote", "file", "out")

    action = add_action("from-nanogpt", "convert_nanogpt", "read a ckpt.pt of nanoGPT", "file", "out")
    action.add_argument(
        "--tokenizer", metavar="CORPUS", help="tokenizer: a corpus, meta.pkl, or any form that prepare takes"
    )
    add_action("to-nanogpt", "convert_nanogpt", "write a ckpt.pt of nanoGPT", "checkpoint", "out")

    action = add_action(
        "to-deepspeed", "convert_deepspeed", "write a ZeRO directory or a universal checkpoint", "checkpoint", "out"
    )
    action.add_argument("--stage", type=int, choices=(1, 2, 3), help="write a ZeRO directory of this stage")
    action.add_argument("--world", type=int, default=1, metavar="N", help="ranks of the ZeRO directory; default: 1")
    action.add_argument("--universal", action="store_true", help="write a universal checkpoint, for any rank count")
    action = add_action(
        "from-deepspeed", "convert_deepspeed", "read such a directory, with the optimizer state", "directory", "out"
    )
    action.add_argument(
        "--like", required=True, metavar="DIR", help="a run or checkpoint with the same config and tokenizer"
    )


def _add_comparisons(add_action: AddAction) -> None:
    add_action("average", "compare_checkpoints", "average the weights of several checkpoints", "out", "checkpoints")
    action = add_action("diff", "compare_checkpoints", "list the tensors in which two checkpoints differ", "a", "b")
    action.add_argument("--all", action="store_true", dest="show_equal", help="list equal tensors too")
    add_action(
        "inspect", "compare_checkpoints", "list names, shapes, dtypes, norms and non-finite values", "checkpoint"
    )
    add_action("verify", "compare_checkpoints", "check all bytes and the probe of a checkpoint", "checkpoint")


def run(options: argparse.Namespace) -> int:
    """Call the function of the action. Returns its exit code."""
    return call_function(options)
