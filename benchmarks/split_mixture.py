"""A mixture of experts made from a dense Llama: its MLPs are split, and routers are trained to choose the parts.

Of each MLP the neurons that contribute most make a shared expert; the others go to experts of equal size by which of
them are active together (balanced k-means, after MoEfication, Zhang et al. 2022, arXiv:2110.01786). A router is
trained to give what all experts give, then the whole is distilled from the dense model for some steps. What comes of it
is saved as a Qwen2-MoE checkpoint. It takes minutes on two cores.

    python benchmarks/split_mixture.py MODEL OUT --records alpaca.json

MODEL is a folder, hub id, GGUF file or ``package:`` reference of a Llama.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from scoring import machine
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from quantkit import calibration
from quantkit.checkpoint.companions import copy_companions
from quantkit.recipe import CalibrationSpec, ModelSpec
from quantkit.source import resolve

ROUNDS = 8
"""Of k-means."""
ROUTER_STEPS = 200
ROUTER_TOKENS = 1024


def rows_of(given: argparse.Namespace, folder: Path, work: Path) -> list[list[int]]:
    """Token ids of the records, in rows of one length."""
    spec = CalibrationSpec(dataset=str(given.records), samples=10**6, max_length=given.length, packing="full")
    return [list(row) for row in calibration.build(spec, folder, work / "rows").rows if len(row) == given.length]


def mlp_inputs(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """What each block's MLP reads, ``[tokens, hidden]``."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, place=place: seen[place].append(args[0].flatten(0, 1)))
        for place, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in rows:
            model.model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in seen]


def clusters(active: torch.Tensor, count: int) -> torch.Tensor:
    """Neurons that are active together: int64 ``[count, size]``, from ``[tokens, neurons]``; balanced k-means."""
    features = nn.functional.normalize(active.abs().T, dim=1)
    size = len(features) // count
    centres = features[torch.linspace(0, len(features) - 1, count).long()]
    chosen: list[list[int]] = []
    for _ in range(ROUNDS):
        likeness = features @ centres.T
        chosen, free = [[] for _ in range(count)], set(range(len(features)))
        for place in likeness.flatten().argsort(descending=True).tolist():
            neuron, centre = divmod(place, count)
            if neuron in free and len(chosen[centre]) < size:
                free.remove(neuron)
                chosen[centre].append(neuron)
        centres = nn.functional.normalize(torch.stack([features[each].mean(0) for each in chosen]), dim=1)
    return torch.tensor(chosen)


def routed(logits: torch.Tensor, top: int) -> torch.Tensor:
    """How much of each expert a token gets, ``[tokens, experts]``: as Qwen2-MoE with ``norm_topk_prob``, times top."""
    chosen = logits.softmax(-1).topk(top)
    return torch.zeros_like(logits).scatter(1, chosen.indices, top * chosen.values / chosen.values.sum(1, keepdim=True))


def train_router(inputs: torch.Tensor, outputs: torch.Tensor, top: int) -> torch.Tensor:
    """A router, ``[experts, hidden]``, whose mixture of ``[tokens, experts, hidden]`` is close to the sum of all."""
    strength = outputs.norm(dim=2)
    strength = 2 * strength / strength.mean()
    gram = inputs.T @ inputs
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    router = torch.linalg.solve(gram, inputs.T @ (strength - strength.mean())).T.contiguous().requires_grad_()
    adam, draw = torch.optim.Adam([router], lr=3e-3), torch.Generator().manual_seed(0)
    whole = outputs.sum(1)
    for _ in range(ROUTER_STEPS):
        part = torch.randint(len(inputs), (ROUTER_TOKENS,), generator=draw)
        logits = inputs[part] @ router.T
        given = torch.einsum("te,teh->th", routed(logits, top), outputs[part])
        balance = logits.softmax(-1).mean(0).square().sum() * logits.shape[1]
        loss = (given - whole[part]).square().mean() / whole[part].square().mean() + 0.01 * balance
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
    found: torch.Tensor = router.detach()
    return found


def split(mlp: Any, inputs: torch.Tensor, given: argparse.Namespace) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of a block's mixture, and the relative error of its output."""
    gate, up, down = (each.weight.detach() for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    active = nn.functional.silu(inputs @ gate.T) * (inputs @ up.T) * down.norm(dim=0)
    strongest = active.square().mean(0).argsort(descending=True)
    shared, rest = strongest[: given.shared], strongest[given.shared :].sort().values
    members = rest[clusters(active[::4, rest], given.experts)]
    outputs = torch.stack([(active[:, each] / down.norm(dim=0)[each]) @ down[:, each].T for each in members], 1)
    router = train_router(inputs, outputs, given.top)
    mixed = torch.einsum("te,teh->th", routed(inputs @ router.T, given.top), outputs)
    whole = mlp(inputs)
    error = float((mixed - outputs.sum(1)).square().sum() / whole.square().sum())
    return {
        "gate.weight": router,
        "experts.gate_up_proj": torch.stack([torch.cat([gate[each], up[each]]) for each in members]),
        "experts.down_proj": given.top * torch.stack([down[:, each] for each in members]),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        "shared_expert.down_proj.weight": 2 * down[:, shared],  # its gate, all zeros, lets half of it through
        "shared_expert_gate.weight": torch.zeros(1, gate.shape[1]),
    }, error


def mixture_config(config: Any, given: argparse.Namespace) -> Qwen2MoeConfig:
    """The config of the mixture."""
    alike = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters bos_token_id eos_token_id "
        "pad_token_id"
    )
    left = config.intermediate_size - given.shared
    return Qwen2MoeConfig(
        **{key: getattr(config, key) for key in alike.split()},
        moe_intermediate_size=left // given.experts,
        shared_expert_intermediate_size=given.shared,
        num_experts=given.experts,
        num_experts_per_tok=given.top,
        norm_topk_prob=True,
        qkv_bias=False,
    )


def distil(student: Any, teacher: Any, rows: list[list[int]], steps: int, batch: int) -> None:
    """Train all but embeddings to the teacher's next-token distributions."""
    student.requires_grad_(True)
    student.get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    adam, draw = torch.optim.Adam(trained, lr=2e-4), torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = torch.tensor([rows[place] for place in torch.randint(len(rows), (batch,), generator=draw).tolist()])
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        found = student(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        loss = nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        adam.zero_grad()
        torch.autograd.backward(loss)
        for group in adam.param_groups:
            group["lr"] = 2e-4 * (1 - step / steps)
        adam.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: divergence {loss.item():.4f}", flush=True)
    student.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=Path, required=True, help="records to train on, in alpaca form")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top", type=int, default=4, help="experts that a token goes to")
    parser.add_argument("--shared", type=int, default=512, help="neurons of the shared expert")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens from which MLPs are split and routers trained")
    parser.add_argument("--length", type=int, default=256, help="of a row of tokens")
    parser.add_argument("--steps", type=int, default=60, help="of distilling the whole")
    parser.add_argument("--batch", type=int, default=2, help="rows of such a step")
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(ModelSpec(source=given.model), Path(scratch)).folder
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        rows = rows_of(given, folder, Path(scratch))
        mixture = Qwen2MoeForCausalLM(mixture_config(dense.config, given)).eval()
        state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
        errors = []
        for place, inputs in enumerate(mlp_inputs(dense, rows[: given.tokens // given.length])):
            tensors, error = split(dense.model.layers[place].mlp, inputs, given)
            state |= {f"model.layers.{place}.mlp.{name}": tensor for name, tensor in tensors.items()}
            errors.append(error)
            print(f"block {place}: error of the MLP {error:.4f}", flush=True)
        mixture.load_state_dict(state)
        distil(mixture, dense, rows, given.steps, given.batch)
        mixture.to(torch.float16).save_pretrained(given.out)
        copy_companions(folder, given.out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(given.out)
    print(json.dumps({"benchmark": "split_mixture", "errors": errors, "machine": machine()}))


if __name__ == "__main__":
    main()
