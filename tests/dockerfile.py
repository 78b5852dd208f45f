"""Dockerfiles without Docker: read strictly, and carried out in a folder.

`carry_out` runs the RUN and COPY lines themselves. The folder stands for the file system's root: absolute paths that
the Dockerfile itself makes (by COPY, WORKDIR, or as a virtual environment) are put below it wherever they are named.
Base images are taken for this machine's Python; a user is only noted.
"""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT",
         "CMD"}  # fmt: skip


@dataclass
class Instruction:
    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self):
        """Of the exec form (a JSON list of strings), or of a line without quotes."""
        return json.loads(self.value) if self.value.startswith("[") else self.value.split()


@dataclass
class Stage:
    base: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def last(self, name):
        return [step for step in self.steps if step.name == name][-1]


def stages(path):
    """The stages with their instructions; an unknown one and a flag without a value are errors."""
    text = re.sub(r"^\s*#.*\n", "", Path(path).read_text(encoding="utf-8"), flags=re.M)
    result, values = [], {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        assert name in KNOWN, f"unknown instruction: {line}"
        flags = {}
        while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        assert rest.strip() and not rest.startswith("--"), line
        if name == "FROM":
            base, _, stage = rest.strip().partition(" AS ")
            result.append(Stage(substitute(base, values), stage))
        elif result:
            result[-1].steps.append(Instruction(name, flags, rest.strip()))
        else:
            values |= [rest.strip().split("=", 1)]
    return result


def substitute(text, values):
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: values.get(m[1] or m[2], ""), text)


@dataclass
class Image:
    """What the last stage leaves."""

    root: Path
    folder: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)  # absolute paths of the image

    def here(self, text):
        """The text with the image's paths as they are on this machine."""
        for path in sorted(self.made, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w.-])", str(self.root) + path, text)
        return text

    def path(self, name):
        return self.root / str(Path(self.folder) / name).lstrip("/")


def carry_out(path, context, root, environment, log=None):
    """Carry out all stages, each in its own folder below `root`; the last one's `Image`."""
    images = {}
    for number, stage in enumerate(stages(path)):
        image = images[stage.name or "last"] = Image(Path(root) / str(number), environment=dict(environment))
        image.root.mkdir(parents=True)
        values = {}
        for step in stage.steps:
            if step.name == "ARG":
                values |= [step.value.partition("=")[::2]]
            elif step.name == "ENV":
                for word in shlex.split(step.value):
                    name, _, value = word.partition("=")
                    image.environment[name] = image.here(substitute(value, image.environment))
            elif step.name == "WORKDIR":
                image.folder = step.value
                image.path("").mkdir(parents=True, exist_ok=True)
                image.made.append(step.value)
            elif step.name == "COPY":
                _copy(step, image, images, context)
            elif step.name == "RUN":
                image.made += re.findall(r"-m venv (/\S+)", step.value)
                subprocess.run(
                    ["sh", "-c", image.here(step.value)], check=True, cwd=image.path(""), stdout=log, stderr=log,
                    env=image.environment | values,
                )  # fmt: skip
    return images["last"]


def _copy(step, image, images, context):
    *sources, target = step.words
    origin = images[step.flags["from"]] if "from" in step.flags else None
    for source in sources:
        there, goal = origin.path(source) if origin else Path(context) / source, image.path(target)
        if there.is_dir():
            ignore = None if origin else shutil.ignore_patterns("__pycache__")  # as the .dockerignore says
            shutil.copytree(there, goal, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        else:
            goal = goal / there.name if target.endswith("/") else goal
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there, goal)
    if origin:  # an environment's scripts name the folder it was made in, which in an image stays the same
        before, after = (str(place).encode() for place in (origin.path(sources[0]), image.path(target)))
        for script in image.path(target).glob("bin/*"):
            if script.is_file() and not script.is_symlink() and before in (text := script.read_bytes()):
                script.write_bytes(text.replace(before, after))
        image.made.append(target)
