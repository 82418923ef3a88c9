"""Show what this machine can run, and whether a checkpoint fits its memory before loading it.

fasteagle doctor
fasteagle doctor --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B \\
    --dtype bfloat16 --max_length 2048
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import torch

from fasteagle import __version__
from fasteagle.assemble import pick_device, pick_dtype
from fasteagle.commands.compiling import compiler_problem
from fasteagle.commands.draft_flags import check_model_flags
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import add_model
from fasteagle.commands.plan import Plan, make_plan
from fasteagle.compile import Compiler
from fasteagle.errors import first_line
from fasteagle.footprint import advice
from fasteagle.memory import free_memory, size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle doctor`."""
    add_model(parser)
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=1,
        metavar="N",
        help="rows decoded together, for the plan (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Print what there is, try to compile, and plan a checkpoint's memory."""
    check_model_flags(args)
    device = pick_device(args.device)
    path = args.checkpoint_path
    dtype = pick_dtype(args.dtype, device, path, revision=args.revision)
    plan = make_plan(args, dtype, device)  # a wrong path ends here, at once
    for name, value in machine(device).items():
        print(f"{name:18}{value}")
    print(f"{'torch.compile':18}{try_compile(device)}", end="\n\n", flush=True)
    print("\n".join(plan.words))
    print("\n".join(plan.layers))
    for name, n_bytes in plan.n_bytes.items():
        print(f"  {name:18}{size_text(n_bytes):>12}")
    print(f"  {'total':18}{size_text(plan.total):>12}")
    print(verdict(plan, free_memory(device), device))


def machine(device: torch.device) -> dict[str, str]:
    """Versions and hardware, as lines to print."""
    facts = {
        "fasteagle": __version__,
        "Python": f"{platform.python_version()} on {platform.platform(terse=True)}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "CPU": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    }
    facts["device"] = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device)
        facts["device"] += (
            f": {name.name}, compute capability {name.major}.{name.minor}, "
            f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
        total = torch.cuda.mem_get_info(device)[1]
        facts["attention kernels"] = ", ".join(attention_kernels())
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["device"] += f": bfloat16 {'fast' if fast_bfloat16() else 'works, but is slow'}"
        facts["attention kernels"] = "torch's CPU kernels"
    facts["memory"] = f"{size_text(free_memory(device))} free of {size_text(total)}"
    return facts


def attention_kernels() -> list[str]:
    """The CUDA kernels that scaled_dot_product_attention may choose from."""
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return [name for name, on in enabled.items() if on]


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def try_compile(device: torch.device) -> str:
    """Whether compiling works here, found out by compiling something tiny."""
    problem = compiler_problem(device)
    if problem:
        return f"no: it needs {problem}; decode without --compile, or install it"
    compiler = Compiler(enabled=True, device=device)
    number = torch.zeros(16, device=device)
    started = time.perf_counter()

    def increment(number: torch.Tensor) -> None:
        number.add_(number.sin() + 1)

    part = compiler.part(increment, "doctor_part")
    try:
        compiler.step(lambda: part(number), "doctor", [number])()
    except RuntimeError as error:  # Dynamo's and Inductor's errors are
        return f"no: {first_line(error)}; decode without --compile"
    assert bool((number == 1).all()), f"compiled code gives {number[0]}, not 1"
    return f"works (tried in {time.perf_counter() - started:.1f} s)"


def verdict(plan: Plan, free: float, device: torch.device) -> str:
    """Whether the plan fits, and what to try where it does not."""
    text = f"{size_text(plan.total)} of {size_text(free)} free on {device}"
    if plan.total <= free:
        return f"fits: {text}"
    weights = plan.n_bytes["weights"]
    others = plan.total - weights
    words = f"does not fit: {text}; the model's weights are {size_text(weights)} of it"
    if weights <= free:
        words += "; try a smaller --max_length or --batch_size"
    return f"{words}; {advice(plan.smaller, free - others * 2 / plan.itemsize)}"
