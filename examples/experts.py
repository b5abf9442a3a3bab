"""Adapters on the experts of a mixture-of-experts model, at a fraction of the smallest budget that LoRA can have.

    python examples/experts.py                                                  # a tiny random model, seconds
    python examples/experts.py --model Qwen/Qwen3-30B-A3B --data notes.txt

The data is a text file. Any model with the experts interface of transformers 5 works: Qwen3-MoE, Mixtral, GPT-OSS,
DeepSeek-V3, OLMoE, Granite-MoE, GLM4-MoE and others.
"""

import common
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mos_ext


def main(argv: list[str] | None = None) -> None:
    options = common.arguments(__doc__, argv, "experts-output", "a text file", (20, 1000))
    name = options.model or tiny.language_model(options.output / "base", experts=8)
    blocks = common.blocks(AutoTokenizer.from_pretrained(name), options.data, length=512 if options.model else 32)

    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto" if options.model else None)
    config = mos_ext.MoSConfig(
        r=16 if options.model else 4,
        equivalent_rank=8 if options.model else 2,
        # All linears beside the experts, attention's above all; norms, and routers of parameters, stay as they are.
        target_modules="all-linear",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        # LoRA has at least rank 1 on each of thousands of experts. A pool that they share may have an eighth of that.
        expert_equivalent_rank=1 / 8 if options.model else 1 / 2,
    )
    mos_ext.adapt(model, config)
    print(mos_ext.parameter_report(model))

    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=2e-4 if options.model else 1e-2
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for step in range(options.steps):
        batch = blocks[torch.randint(len(blocks), (4,))].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    mos_ext.save_adapter(model, options.output / "adapter")
    mos_ext.export_lora(model, options.output / "lora")  # in PEFT's layout of target_parameters
    for folder in ("adapter", "lora"):
        size = (options.output / folder / "adapter_model.safetensors").stat().st_size
        print(f"{options.output / folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
