"""Fine-tunes one MoE layer with LoRA, in plain PyTorch: python examples/train_layer.py [--method AMXINT8_SFT]

The experts W are given and stay frozen. A teacher computes with W plus a low-rank change, which is hidden from us; six
LoRA tensors learn it from what the teacher answers.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ktmoe import KTMoEWrapper
from ktmoe.lora import LORA_NAMES, lora_shapes
from ktmoe.methods import methods_of

EXPERTS, TOP_K, HIDDEN, INTER, RANK, TOKENS = 8, 2, 128, 64, 4, 256
LAYER = {
    "layer_idx": 0,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
}


def low_rank_change(weight: Tensor) -> Tensor:
    """A random change of rank RANK, half as large as the weight [experts, n, k]."""
    experts, n, k = weight.shape
    change = torch.randn(experts, n, RANK) @ torch.randn(experts, RANK, k)
    return 0.5 * change * weight.norm() / change.norm()


def new_lora() -> list[torch.nn.Parameter]:
    """Six fp32 matrices in the order of LORA_NAMES. A is random and B zero, so the layer starts as its base."""
    return [
        torch.nn.Parameter(torch.randn(shape) / shape[2] ** 0.5 if name.endswith("_a") else torch.zeros(shape))
        for name, shape in zip(LORA_NAMES, lora_shapes(EXPERTS, HIDDEN, INTER, RANK), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="AMXBF16_SFT", choices=[method.name for method in methods_of("sft")])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # torch has little to do here; its idle threads would spin on the cores of the engine

    shapes = (INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)  # gate, up, down
    weights = [torch.randn(EXPERTS, n, k) / k**0.5 for n, k in shapes]
    teacher = KTMoEWrapper(**LAYER, method="BF16", mode="inference")
    teacher.load_weights_from_tensors(*((w + low_rank_change(w)).bfloat16() for w in weights))
    layer = KTMoEWrapper(**LAYER, method=args.method, mode="sft", lora_rank=RANK, lora_alpha=2 * RANK)
    layer.load_weights_from_tensors(*(w.bfloat16() for w in weights))
    lora = new_lora()
    layer.init_lora_weights(*lora)
    router = torch.randn(HIDDEN, EXPERTS) / HIDDEN**0.5

    def batch() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """(hidden states, expert ids, routing weights), and the teacher's answer."""
        x = torch.randn(TOKENS, HIDDEN)
        scores, ids = (x @ router).topk(TOP_K)
        inputs = x.bfloat16(), ids, scores.softmax(-1)
        return inputs, teacher.forward(*inputs).float()

    held_out, held_out_answer = batch()

    def held_out_loss() -> float:
        return mse_loss(layer.forward_sft(*held_out, save_for_backward=False).float(), held_out_answer).item()

    before = held_out_loss()
    optimizer = torch.optim.AdamW(lora, lr=1e-2, weight_decay=0.0)
    for step in range(args.steps):
        inputs, answer = batch()
        output = layer.forward_sft(*inputs).float().requires_grad_()
        loss = mse_loss(output, answer)
        loss.backward()  # down to the layer's output; from there on it is the layer's work
        _grad_input, grads = layer.backward(output.grad.bfloat16())
        for name, parameter in zip(LORA_NAMES, lora, strict=True):
            parameter.grad = grads[f"grad_{name}"]
        optimizer.step()  # the next forward sees the new values by itself
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    after = held_out_loss()
    print(f"{args.method}: held-out loss {before:.4f} -> {after:.4f}, {before / after:.1f} times smaller")


if __name__ == "__main__":
    main()
