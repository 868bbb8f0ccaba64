"""Commands and library calls one after another, in one process: arguments are a folder and a recipe.

There is no ``if __name__ == "__main__"`` here, and new processes are spawned: a process that imported this file again
would begin anew.
"""

import multiprocessing
import sys
from pathlib import Path

from smidgen.cli.main import main

multiprocessing.set_start_method("spawn")
folder, recipe = Path(sys.argv[1]), sys.argv[2]
run, merged = str(folder / "run"), str(folder / "merged")
print("BEGIN")

ASK = "what is the colour of the sky"
for command in (
    ["check", recipe],
    ["train", recipe],
    ["verify", run],
    ["evaluate", run, "--data", str(folder / "rows.jsonl")],
    ["generate", run, ASK],
    ["merge", run, merged],
    ["generate", merged, ASK],
    ["inspect", run],
    ["inspect", merged],
):
    sys.argv = ["smidgen", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command}: exit code {end.code}")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from smidgen import LoraConfig, PeftModel, get_peft_model  # noqa: E402

base = AutoModelForCausalLM.from_pretrained(folder / "base")
base.config._name_or_path = "nobody/a-base-that-is-gone"  # saving must not ask for it
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.01)
ids = torch.tensor([[1, 5, 6, 7]])
before = model(input_ids=ids).logits
model.save_pretrained(folder / "library")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "library")
assert torch.equal(again(input_ids=ids).logits, before)
plain = again.merge_and_unload()
plain.save_pretrained(folder / "library merged")
torch.testing.assert_close(plain(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
print("END")
