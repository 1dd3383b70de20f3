"""Many PEFT folders in, one out: FlexLoRA's server step over adapters that you trained elsewhere.

    python examples/aggregate_folders.py OUT --rank 8 CLIENT_A=120 CLIENT_B=80

Each argument is a PEFT folder and its number of training examples; ranks, alphas and rsLoRA may
differ. OUT is a PEFT folder with T_8 of the weighted mean of the products.
"""

import argparse
import json
from pathlib import Path

from flexlora import aggregate, load_adapter, save_adapter

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("clients", nargs="+", metavar="FOLDER=EXAMPLES")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--method", default="flexlora", help="any method of flexlora.aggregation")
    options = parser.parse_args()

    clients = [argument.rpartition("=") for argument in options.clients]
    updates = [(load_adapter(folder), int(examples)) for folder, _, examples in clients]
    total = aggregate(updates, method=options.method)

    config = json.loads((Path(clients[0][0]) / "adapter_config.json").read_text())
    merged = total.adapter(rank=options.rank, alpha=options.alpha)
    save_adapter(merged, options.out, base=config["base_model_name_or_path"])
    kept = total.total_energy_kept(dict.fromkeys(total, options.rank))
    print(
        f"{len(updates)} adapters -> {options.out}, rank {options.rank}: {kept:.1%} of the energy"
    )
