"""Measure this machine and the flash of a directory, so that plan and run know what to expect.

It takes half a minute, and a file of up to 768 MiB, which is removed again. Given a model's file,
it reads that file and writes none. The profile is kept in XDG_CACHE_HOME/flashinfer
(~/.cache/flashinfer).
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from flashinfer.cli.common import add_json, positive, progress_bars, write_json
from flashinfer.formats.errors import printable
from flashinfer.formats.files import refuse_loss
from flashinfer.paper.open_file import IO
from flashinfer.plan.profile import MANY, Profile, cache_path, prepare, save
from flashinfer.probe.probing import probe


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory where models lie, or a model")
    parser.add_argument("--io", choices=IO, default="auto", help="how to read (auto)")
    parser.add_argument("-t", "--threads", type=positive, help="default: the cores there are")
    parser.add_argument("-o", "--output", metavar="FILE", dest="profile",
                        help="keep the profile there instead")  # fmt: skip
    add_json(parser)


def main(args: Namespace) -> None:
    path = Path(args.profile) if args.profile else cache_path(args.path)
    prepare(path)
    if os.path.isfile(args.path):
        refuse_loss(path, [args.path])
    with progress_bars() as progress:
        found = probe(args.path, args.threads, args.io, progress)
    save(found, path)
    if args.json != "-":
        print_profile(found)
        print(f"\nkept in {printable(path)}")
    write_json(args.json, found.as_json())


def print_profile(profile: Profile) -> None:
    """The figures, for people."""
    print(f"{printable(profile.name)}: {printable(profile.note)}\n")
    alone = [1e6 * seconds for seconds in profile.alone.values()]
    print("random reads, KiB  " + "".join(f"{size >> 10:8}" for size in profile.reads))
    print("  many, MB/s       " + "".join(f"{v / 1e6:8,.0f}" for v in profile.reads.values()))
    print("  one alone, us    " + "".join(f"{microseconds:8,.0f}" for microseconds in alone))
    tiles = [f"{speed / 1e6:,.0f} ({size >> 10} KiB)" for size, speed in profile.streams.items()]
    print(
        f"streams, tiles of  {', '.join(tiles)} MB/s\n"
        f"DRAM               {profile.dram / 1e9:.1f} GB/s, {profile.threads} threads\n"
    )
    print(f"products, GB/s of weights    all rows   some rows   {MANY} tokens, of one")
    for name in profile.linear:
        print(
            f"  {name:<24}{profile.linear[name] / 1e9:11.1f}{profile.sparse[name] / 1e9:12.1f}"
            f"{profile.many[name]:17.1f}x"
        )
    submits = [1e6 * seconds for seconds in profile.submit.values()]
    print(
        f"\na layer besides these  {1e6 * profile.layer:.0f} us a token, with a neuron cache "
        f"{1e6 * profile.cached:.0f} us\n"
        f"a read takes           {min(submits):.1f} to {max(submits):.1f} us of the CPU's\n"
        f"threads wake in        {1e6 * profile.wake:.0f} us"
    )
