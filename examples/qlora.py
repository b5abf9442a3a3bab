"""QLoRA's recipe, which is the paper's: a base in 4-bit NF4, float32 pools, computation in bfloat16.

    python examples/qlora.py                                                    # a tiny random model, seconds
    python examples/qlora.py --model meta-llama/Llama-3.2-1B --data notes.txt

The data is a text file. bitsandbytes quantises on GPUs and on CPUs.
"""

import common
import tiny
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import mos_ext
import mos_ext.integrations.peft  # registers MoS with PEFT
from mos_ext.integrations.peft import MoSConfig


def main(argv: list[str] | None = None) -> None:
    options = common.arguments(__doc__, argv, "qlora-output", "a text file", (20, 1000))
    name = options.model or tiny.language_model(options.output / "base")
    blocks = common.blocks(AutoTokenizer.from_pretrained(name), options.data, length=512 if options.model else 32)

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = MoSConfig(
        r=32 if options.model else 4,
        equivalent_rank=16 if options.model else 2,
        dropout=0.1 if options.model else 0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=2e-4 if options.model else 1e-2
    )
    model.train()
    for step in range(options.steps):
        batch = blocks[torch.randint(len(blocks), (4,))].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(options.output / "adapter")
    print(mos_ext.explain(model))  # which way each layer takes over its quantised base


if __name__ == "__main__":
    main()
