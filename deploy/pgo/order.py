"""The order of functions in the program's file: `llvm-profdata show --all-functions --counts FILE | order.py BINARY > ORDER`, for
the linker's --symbol-ordering-file.  BINARY is the instrumented one, which ran.

A process holds its program in windows of 64 KiB around each page that it touches.  What an agent ever runs is a sixth of the
program; spread evenly it would bring nearly all of the file into memory.  So: first what ran, the busiest first; then what
the profile does not know (the standard library, C and assembler); then, unnamed here, what never ran."""
import re, subprocess, sys


def ran(lines):
    """Names of the functions that a profile knows, and how often the busiest part of each ran."""
    name = None
    for line in lines:
        if found := re.fullmatch(r"  (\S.*):", line.rstrip()):
            # A function that its object keeps to itself is written FILE;NAME.
            name = found[1].rsplit(";", 1)[-1]
        elif found := re.match(r"    Block counts: \[(.*)\]", line):
            yield name, max(map(int, found[1].split(",")), default=0) if found[1] else 0


def main():
    counts = {}
    for name, count in ran(sys.stdin):
        counts[name] = max(count, counts.get(name, 0))
    if not counts:
        sys.exit("no functions in the profile: is it `llvm-profdata show --all-functions --counts`?")
    listed = subprocess.run(["nm", sys.argv[1]], check=True, capture_output=True, text=True).stdout
    symbols = [words[2] for words in map(str.split, listed.splitlines()) if len(words) == 3 and words[1] in "tTwW"]
    first = sorted((name for name, count in counts.items() if count), key=lambda name: -counts[name])
    unknown = dict.fromkeys(name for name in symbols if name not in counts and not name.startswith("__llvm_"))
    print(f"{len(first)} functions ran, {len(counts) - len(first)} did not, {len(unknown)} are not in the profile", file=sys.stderr)
    print("\n".join([*first, *unknown]))


main()
