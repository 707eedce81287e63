"""Loads the comparison harness's lab.py as a module: the file itself runs its main() when it is imported."""
import os, sys, types


def load(harness):
    """harness: a folder with lib/lab.py and peers/.  Returns the module; its paths are those of the folder."""
    path = os.path.join(os.path.abspath(harness), "lib", "lab.py")
    text = open(path).read().rstrip()
    head, sep, last = text.rpartition("\n")
    if last.strip() != "main()":
        raise SystemExit(f"{path}: expected `main()` as its last line")
    lab = types.ModuleType("lab")
    lab.__file__ = path
    sys.modules["lab"] = lab
    exec(compile(head + sep, path, "exec"), lab.__dict__)
    return lab
