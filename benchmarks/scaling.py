"""How the bytes of a step's collectives grow with the number of chips, read from compiled programs.

    pip install -e '.[plan]' && python -m benchmarks.scaling --output=runs/scaling

The train step is compiled, not run, for TPU slices from 8 to 1,024 chips, with and without the
memory bank: weak scaling keeps the images per chip, strong scaling keeps the batch. It writes a
Markdown table, `<output>.md`, and a picture, `<output>.png`. A step of SiT-XL/2 takes about a
minute to compile on two quiet cores; --size=s_2 is quicker.
"""

import argparse
import pathlib
from typing import Any

from repulsor_jax.files import pictures
from repulsor_jax.runtime import chips as chips_lib

SLICES = {
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    32: "v5p:2x4x4",
    64: "v5p:4x4x4",
    128: "v5p:4x4x8",
    256: "v5p:4x8x8",
    512: "v5p:8x8x8",
    1024: "v5p:8x8x16",
}
VARIANTS = ("none", "repulsor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="xl_2", help="as configs/imagenet256.py has it")
    parser.add_argument("--chips", default="8,32,128,512,1024", help=f"of {sorted(SLICES)}")
    parser.add_argument("--scaling", default="weak,strong")
    parser.add_argument("--images_per_chip", type=int, default=4, help="weak scaling")
    parser.add_argument("--batch_size", type=int, default=1024, help="strong scaling")
    parser.add_argument("--bank_rows", type=int, default=65_536)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/scaling"))
    args = parser.parse_args()
    counts = [int(n) for n in args.chips.split(",")]
    unknown = sorted(set(counts) - set(SLICES))
    if unknown:
        parser.error(f"--chips: no slice of {unknown} chips; known are {sorted(SLICES)}")

    rows: list[dict[str, Any]] = []
    for scaling in args.scaling.split(","):
        for count in counts:
            batch = args.images_per_chip * count if scaling == "weak" else args.batch_size
            found = {name: measure(args, count, batch, name) for name in VARIANTS}
            rows.append({"scaling": scaling, "chips": count, "batch": batch, **found})
            print(line(rows[-1]), flush=True)
    write(args, rows)


def measure(args: argparse.Namespace, count: int, batch: int, name: str) -> dict[str, Any]:
    """Compiles one step and reads it."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from configs import imagenet256
    from repulsor_jax import config as config_lib
    from repulsor_jax.planning.programs import abstract_experiment, compile_program
    from repulsor_jax.planning.summary import describe_program
    from repulsor_jax.planning.topology import open_topology

    c = imagenet256.get_config(f"{args.size},{name}")
    c.batch_size, c.sampling.batch_size = batch, count
    c.mesh.fsdp, c.repulsor.bank_rows = args.fsdp, args.bank_rows
    c.model.remat = "full"  # the whole batch fits 8 chips; the gradients are the same
    config, topology = config_lib.parse(c), open_topology(SLICES[count])
    experiment = abstract_experiment(config, pathlib.Path(), topology)
    program = compile_program("train", experiment, topology)
    if program.refusal:
        raise SystemExit(f"{SLICES[count]}, batch {batch}: {program.refusal}")
    print(f"{SLICES[count]}, batch {batch}, {name}: {program.seconds:.0f} s")
    train = describe_program(program, config, topology)
    return {
        "bytes": train["collective_bytes_per_device"],
        "sent": sum(row["sent_bytes"] for row in train["collectives"]),
        "carries_the_bank": train["carries_the_bank"],
    }


def line(row: dict[str, Any]) -> str:
    none, bank = row["none"], row["repulsor"]
    return (
        f"| {row['scaling']} | {row['chips']} | {row['batch']:,} | {none['bytes']:,} "
        f"| {bank['bytes']:,} | {bank['bytes'] - none['bytes']:,} "
        f"| {bank['bytes'] / none['bytes'] - 1:.2%} | {none['sent']:,} | {bank['sent']:,} "
        f"| {'YES' if bank['carries_the_bank'] else 'no'} |"
    )


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the table and the picture."""
    head = (
        "| scaling | chips | batch | bytes, none | bytes, repulsor | the method's | of none "
        "| sent, none | sent, repulsor | bank travels |"
    )
    title = (
        f"{args.size}, K = {args.bank_rows:,}, mesh.fsdp={args.fsdp}: bytes that the collectives "
        "of a step yield, and that a ring would send, on each device"
    )
    table = "\n".join([title, "", head, "|" + "---|" * 10, *map(line, rows)]) + "\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".md").write_text(table)
    mib = chips_lib.GIB / 2**10
    curves = {
        f"{scaling} scaling, MiB a step": {
            label: (
                [row["chips"] for row in rows if row["scaling"] == scaling],
                [pick(row) / mib for row in rows if row["scaling"] == scaling],
            )
            for label, pick in (
                ("without the bank", lambda row: row["none"]["bytes"]),
                ("with the bank", lambda row: row["repulsor"]["bytes"]),
                (
                    "what the method adds",
                    lambda row: row["repulsor"]["bytes"] - row["none"]["bytes"],
                ),
            )
        }
        for scaling in args.scaling.split(",")
    }
    pictures.save_curves(args.output.with_suffix(".png"), curves, "chips")
    print(f"\n{table}\n{args.output.with_suffix('.md')}, {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
