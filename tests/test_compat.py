"""Each private interface of torch and DeepSpeed that we use exists with the expected signature.

If a new version changes an interface, a test here names it.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import dist_llm
from dist_llm import compat

PACKAGE = Path(dist_llm.__file__).parent
COMPAT_FILES = {"compat.py", "engines/deepspeed_compat.py"}

# (file, private name). These names belong to libraries other than torch, or to the interpreter, and rarely change.
ALLOWED_NAMES = {
    ("text/build_tokenizer.py", "_pat_str"),  # tiktoken, which has no other way to read a vocabulary
    ("text/build_tokenizer.py", "_mergeable_ranks"),
    ("text/build_tokenizer.py", "_special_tokens"),
    ("checkpoint/metadata.py", "_Unpickler"),  # of pickle: the class that is written in Python
    ("convert/deepspeed_files.py", "_Pickler"),
    ("io/resumable_file.py", "_Hash"),
}
ALLOWED_CALLS = {"os._exit", "sys._current_frames"}

# Path of a function -> its first parameters, which the package passes.
SIGNATURES = {
    "torch.distributed.tensor._utils:compute_local_shape_and_global_offset": ("global_shape", "mesh", "placements"),
    "torch.distributed.device_mesh:DeviceMesh._flatten": ("self", "mesh_dim_name"),
    "torch.distributed._symmetric_memory:enable_symm_mem_for_group": ("group_name",),
    "torch.distributed.distributed_c10d:_get_default_store": (),
    "torch.optim:AdamW._init_group": (
        *("self", "group", "params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
    ),
    "torch.utils._python_dispatch:_disable_current_modes": (),
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass": ("t",),
    "torch.utils._pytree:tree_leaves": ("tree",),
    "torch.utils._pytree:tree_flatten": ("tree",),
    "torch.utils._pytree:tree_unflatten": ("leaves", "treespec"),
    "torch.utils._pytree:tree_map_only": ("type_or_types_or_pred", "func", "tree"),
    "torch.utils._pytree:register_pytree_node": ("cls", "flatten_fn", "unflatten_fn"),
    "torch._inductor.custom_graph_pass:CustomGraphPass.__call__": ("self", "graph"),
    "torch._inductor.custom_graph_pass:CustomGraphPass.uuid": ("self",),
    "torch._inductor.custom_graph_pass:get_hash_for_files": ("paths",),
}
DEEPSPEED_SIGNATURES = {
    "deepspeed.runtime.pipe.engine:PipelineEngine._exec_optimizer_step": ("self",),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._post_step": ("self", "timer_names"),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._partition_all_parameters": ("self",),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters": (
        *("self", "sub_group_id"),
    ),
}
# Operation -> its arguments. Their types differ between versions: a group's name is a string or an opaque object.
OPERATIONS = {
    "_c10d_functional.all_gather_into_tensor": ("input", "group_size", "group_name"),
    "_c10d_functional.reduce_scatter_tensor": ("input", "reduce_op", "group_size", "group_name"),
    "_c10d_functional.all_reduce": ("input", "reduce_op", "group_name"),
    "_c10d_functional.wait_tensor": ("tensor",),
    "aten._scaled_dot_product_flash_attention_for_cpu": (
        *("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"),
    ),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": (
        *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale"),
    ),
    "aten._scaled_mm": (
        *("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"),
    ),
}


def resolve_name(path):
    """Return the object that `MODULE:NAME.NAME` names."""
    module, _, names = path.partition(":")
    attribute = import_module(module)
    for name in names.split("."):
        attribute = getattr(attribute, name)
    return attribute


@pytest.mark.parametrize("path", SIGNATURES)
def test_torch_has_each_private_function(path):
    check_signature(path, SIGNATURES[path])


@pytest.mark.parametrize("path", DEEPSPEED_SIGNATURES)
def test_deepspeed_has_each_private_function(path):
    check_signature(path, DEEPSPEED_SIGNATURES[path])


def check_signature(path, names):
    """Check that a function begins with these parameters and requires no others."""
    function = resolve_name(path)
    if tuple(inspect.signature(function).parameters) == ("args", "kwargs"):  # a decorator hides the parameters
        (function,) = (cell.cell_contents for cell in function.__closure__ if inspect.isfunction(cell.cell_contents))
    parameters = list(inspect.signature(function).parameters.values())
    assert tuple(parameter.name for parameter in parameters[: len(names)]) == names
    required = [parameter for parameter in parameters[len(names) :] if parameter.default is inspect.Parameter.empty]
    assert all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in required), required


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_has_each_operation(name):
    namespace, _, operation = name.partition(".")
    schema = getattr(getattr(torch.ops, namespace), operation).default._schema
    assert tuple(argument.name for argument in schema.arguments) == OPERATIONS[name]


def test_torch_has_each_private_setting():
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    assert functorch.activation_memory_budget == 1.0
    assert inductor._micro_pipeline_tp is False
    assert inductor.post_grad_custom_pre_pass is None


def test_the_flight_recorder_can_be_read():
    assert hasattr(torch._C._distributed_c10d, compat.FLIGHT_RECORDER_DUMPS[0])
    assert isinstance(compat.read_flight_recorder(), list)


def test_foreach_kernels_compute_as_expected():
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([5.0])]
    assert [float(norm) for norm in compat.foreach_norm(tensors, 2.0, dtype=torch.float64)] == [5.0, 5.0]
    compat.foreach_mul_(tensors, torch.tensor(2.0))
    assert [tensor.tolist() for tensor in tensors] == [[6.0, 8.0], [10.0]]


def test_a_selective_checkpoint_stores_its_outputs():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    contexts = create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    saved = compat.saved_by_selective_checkpoint(contexts)
    with contexts[0]:
        product = torch.ones(2, 3) @ torch.ones(3, 2)
    assert [tensor.shape for tensor in compat.saved_tensors(saved) if tensor is not None].count(product.shape) == 1


def test_a_deepspeed_pipeline_schedule_has_an_optimizer_step():
    engine = import_module("deepspeed.runtime.pipe.engine").PipelineEngine
    assert [kind.__name__ for kind in engine._INSTRUCTION_MAP].count("OptimizerStep") == 1


def list_defined_names(tree: ast.Module) -> set[str]:
    """Return the names of functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def is_private(name: str) -> bool:
    """Return whether a name is private, such as _name."""
    return name.startswith("_") and not name.endswith("__") and name != "_"


TORCH_HOOKS = {"_init_group"}  # private methods of torch's classes that a subclass of ours could override


def find_private_uses(tree: ast.Module, our_names: set[str]) -> Iterator[str]:
    """Yield each import and each attribute with a private name that is not in `our_names`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("dist_llm"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            dotted = ast.unparse(node)
            if dotted.startswith("torch.ops.aten.") or dotted in ALLOWED_CALLS:
                continue  # the name of an operation in a graph is stable
            if node.attr not in our_names or dotted.removeprefix("super().") in TORCH_HOOKS:
                yield dotted


def find_forbidden_uses(root: Path) -> list[str]:
    """Return `file: name` for each use of a foreign private name outside of the compat files."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    our_names = set().union(*map(list_defined_names, trees.values()))
    return [
        f"{file}: {use}"
        for path, tree in trees.items()
        if (file := str(path.relative_to(root))) not in COMPAT_FILES
        for use in find_private_uses(tree, our_names)
        if (file, use.rpartition(".")[2]) not in ALLOWED_NAMES
    ]


def test_only_compat_uses_private_names():
    assert find_forbidden_uses(PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._inductor import config",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "def f(t):\n    return t._local_tensor",
        "import torch\nx = torch._foreach_norm",
        "import torch\nx = torch.ops._c10d_functional.all_reduce",
        "def f(engine):\n    engine._exec_optimizer_step()",
        "class A(B):\n    def _init_group(self, *group):\n        return super()._init_group(*group)",
    ],
)
def test_a_private_use_is_detected(line, tmp_path):
    (tmp_path / "planted.py").write_text(line + "\n", encoding="utf-8")
    assert len(find_forbidden_uses(tmp_path)) == 1, find_forbidden_uses(tmp_path)


def test_our_own_private_names_are_allowed(tmp_path):
    source = "import torch\nclass A:\n    def __init__(self):\n        self._a = torch.ops.aten._scaled_mm\n"
    source += "def f(a):\n    return a._a\n"
    (tmp_path / "planted.py").write_text(source, encoding="utf-8")
    assert find_forbidden_uses(tmp_path) == []
