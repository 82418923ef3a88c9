"""What are the tensors of a layer's experts called, and what do they make?

    E experts  C model dim  I inner size of an expert

Two layouts hold the same values: Mixtral's, a matrix an expert, and the fused one that transformers
5 computes with. Our parameters put the matrices of all experts one under another.
"""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, ...]
ROUTER = "mlp.router.weight"  # the end of our name; it is never quantized
FUSED = "mlp.experts.gate_up_proj"  # the end of a name that only the fused layout has


class Sources(NamedTuple):
    """The tensors that one parameter stacks, top to bottom."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]


def expert_sources(
    layer: str, *, n_experts: int, dim: int, inner: int, fused: bool
) -> dict[str, Sources]:
    """The parameters of a layer's experts and their tensors; layer is such as "layers.3.".

    mlp.router        [E, C]
    mlp.gate_up_proj  [E * 2I, C]  gate and up of expert 0, gate and up of expert 1, ...
    mlp.down_proj     [E * C, I]
    """
    E, C, folder = n_experts, dim, f"model.{layer}"
    folder += "mlp." if fused else "block_sparse_moe."
    gate_up, down = f"{layer}mlp.gate_up_proj.weight", f"{layer}mlp.down_proj.weight"
    found = {f"{layer}{ROUTER}": Sources((f"{folder}gate.weight",), ((E, C),))}
    if fused:
        wide = Sources((f"{folder}experts.gate_up_proj",), ((E, 2 * inner, C),))
        return found | {
            gate_up: wide,
            down: Sources((f"{folder}experts.down_proj",), ((E, C, inner),)),
        }

    def matrices(*kinds: str, shape: Shape) -> Sources:
        names = [f"{folder}experts.{e}.{kind}.weight" for e in range(E) for kind in kinds]
        return Sources(tuple(names), (shape,) * len(names))

    return found | {
        gate_up: matrices("w1", "w3", shape=(inner, C)),  # gate, then up
        down: matrices("w2", shape=(C, inner)),
    }
