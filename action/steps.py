"""The steps of action.yml that need quantkit: ``python steps.py history`` and ``python steps.py check``.

What is set comes in variables: ``INPUT_RECIPE``, ``INPUT_ACCEPT``, ``INPUT_FAIL_ON`` and ``INPUT_HISTORY`` of the
action's inputs, and ``GITHUB_REPOSITORY``, ``GITHUB_OUTPUT`` and ``GITHUB_STEP_SUMMARY`` of GitHub's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit import QuantkitError, Recipe

FAIL_ON = {"unknown": (1, 2), "regressed": (1,), "never": ()}
EXIT_USER_ERROR = 2


def history() -> int:
    """Put the history where the recipe has it, from the newest artifact of its name; at first there is none."""
    name, repository = os.environ["INPUT_HISTORY"], os.environ["GITHUB_REPOSITORY"]
    query = f"repos/{repository}/actions/artifacts?name={name}&per_page=1"
    found = ".artifacts[0] | select(.expired == false) | .workflow_run.id"
    asked = subprocess.run(["gh", "api", query, "--jq", found], stdout=subprocess.PIPE, text=True, check=True)
    run = asked.stdout.strip()
    found_at = places().get("history")
    if run and found_at is not None:
        folder = str(Path(found_at).parent)
        command = ["gh", "run", "download", run, "--repo", repository, "--name", name, "--dir", folder]
        subprocess.run(command, check=True)
    return 0


def check() -> int:
    """Check the recipe or accept its newest run, tell the outputs, and return the exit code of the step."""
    fail_on = os.environ["INPUT_FAIL_ON"]
    if fail_on not in FAIL_ON:
        sys.stdout.write(f"::error::fail-on is '{fail_on}', and must be one of {', '.join(FAIL_ON)}\n")
        return EXIT_USER_ERROR
    accepting = os.environ["INPUT_ACCEPT"] == "true"
    arguments = ["accept", "latest", "--recipe"] if accepting else ["check", "--json"]
    code, told, complaint = quantkit([*arguments, os.environ["INPUT_RECIPE"]])
    outputs = {"exit-code": str(code), **places()}
    try:
        judged = None if accepting else json.loads(told)
    except ValueError:
        judged = None
    if judged is not None:
        outputs |= {"verdict": judged["verdict"], "summary": judged["summary"]}
    else:
        outputs |= {"verdict": "accepted" if accepting and not code else "none", "summary": told.strip() or complaint}
        append("GITHUB_STEP_SUMMARY", f"**quantkit {arguments[0]}**: {outputs['summary']}\n")
    append("GITHUB_OUTPUT", "".join(f"{name}={' '.join(value.split())}\n" for name, value in outputs.items()))
    sys.stdout.write(f"::{'error' if code else 'notice'} title=quantkit {arguments[0]}::{outputs['summary']}\n")
    could_not_run = code != 0 and judged is None and fail_on != "never"
    return code if code in FAIL_ON[fail_on] or could_not_run else 0


def places() -> dict[str, str]:
    """Where the recipe has its folder and its history; nothing where it cannot be read, of which quantkit tells."""
    try:
        recipe = Recipe.load(os.environ["INPUT_RECIPE"])
    except QuantkitError:
        return {}
    return {"folder": str(recipe.folder), "history": str(recipe.history_file)}


def quantkit(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command; its exit code, what it printed, and its last line on standard error."""
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        with subprocess.Popen(["quantkit", *arguments], stdout=told, stderr=subprocess.PIPE, text=True) as child:
            for line in child.stderr or ():
                sys.stderr.write(line)
                last = line.strip() or last
        told.seek(0)
        return child.returncode, told.read(), last


def append(variable: str, text: str) -> None:
    """Add to the file that GitHub has named in a variable."""
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit({"history": history, "check": check}[sys.argv[1]]())
