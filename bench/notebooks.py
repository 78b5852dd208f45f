# ruff: noqa: E501 - paragraphs of the notebooks
"""Write the notebooks for hosted machines, docs/*.ipynb and docs/ko/*.ipynb: their cells are here, once.

python -m bench.notebooks
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
ADDRESS = (
    ""  # public address of the repository, as https://github.com/OWNER/NAME: the notebooks get badges and clone it
)
Cell = tuple[str, ...]  # a heading and text in English and in Korean, or code and a tag

SETTINGS = """from pathlib import Path

REPOSITORY = ""  # address of your copy of jaxchat; empty where this notebook lies in one already
RUNS = Path("runs")  # where runs are kept
SETTINGS = []  # more of launch.py's arguments, such as ["--set", "train.steps=3000"]
"""
START = '''import json
import os
import shlex
import subprocess
import sys
import tempfile

HERE = Path(tempfile.gettempdir())
PYTHON = HERE / "jaxchat-env" / "bin" / "python"
# what a hosted notebook sets for its own packages
ENV = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "MPLBACKEND", "PYTHONPATH")}


def run(*words):
    """Run a command in the repository and show its lines as they come."""
    process = subprocess.Popen(
        [*map(str, words)], cwd=CODE, env=ENV, text=True, encoding="utf-8", errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for line in process.stdout:
            print(line, end="")
    except KeyboardInterrupt:
        process.terminate()  # it saves
        print(process.stdout.read())
    if code := process.wait():
        raise SystemExit("stopped; run this cell again, and it goes on" if code == 75 else f"ended with code {code}")


CODE = HERE
if REPOSITORY and not (HERE / "jaxchat-code").exists():
    run("git", "clone", "--quiet", "--depth", "1", REPOSITORY, HERE / "jaxchat-code")
places = [place for place in (HERE / "jaxchat-code", Path.cwd(), *Path.cwd().parents) if (place / "launch.py").exists()]
if not places:
    raise SystemExit("jaxchat is not here: set REPOSITORY above to the address of your copy of it")
CODE, RUNS = places[0], RUNS.resolve()
print("code", CODE, "runs", RUNS, sep="\\n  ")'''
INSTALL = """def pip(*words):
    run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "--quiet", *words)


if not PYTHON.exists():  # an environment of its own: the packages of this notebook stay as they are
    run(sys.executable, "-m", "venv", "--without-pip", PYTHON.parent.parent)
pip("-r", "requirements.txt")
find = "import json, train.doctor; print(json.dumps(train.doctor.accelerators()))"
found = json.loads(subprocess.check_output([PYTHON, "-c", find], cwd=CODE, env=ENV))
for name, command, _ in found[:1]:
    print(f"{name}: {command}")
    pip(*shlex.split(command)[2:])  # its JAX
if not found:
    how = "Colab: Runtime > Change runtime type; Kaggle: Settings > Accelerator"
    """
CHAT = '''talk = """
import sys
from jaxchat.engine import Engine

engine = Engine.from_pretrained(sys.argv[1])
for question in sys.argv[2:]:
    print(">", question, "\\\\n" + engine.chat([{"role": "user", "content": question}]), "\\\\n")
"""
questions = ["hello", "who are you?", "Tom has 12 apples and buys 30 more. How many?"]
run(PYTHON, "-c", talk, RUNS / "nano", *questions)'''
WRITE = '''write = """
import sys
from jaxchat.engine import Engine

engine = Engine.from_pretrained(sys.argv[1])
requests = [engine.text_request(text, max_tokens=120, temperature=0.8) for text in sys.argv[2:]]
for opening, answer in zip(sys.argv[2:], engine.generate(requests)):
    print(opening + answer.text, "\\\\n")
"""
openings = [%s]
run(PYTHON, "-c", write, RUNS / "%s", *openings)'''
LOOK = """from IPython.display import Image, Markdown, display

display(Image(filename=RUNS / "%s" / "base" / "loss.png"))
display(Markdown((RUNS / "%s" / "samples.md").read_text(encoding="utf-8")))"""
TAKE = """import shutil

archive = shutil.make_archive(str(RUNS / "%s-export"), "zip", RUNS / "%s" / "export")
try:
    from google.colab import files

    files.download(archive)
except ImportError:
    print(archive)"""
DRIVE = """try:
    from google.colab import drive  # only there on Colab

    drive.mount("/content/drive")
    if RUNS == Path("runs"):  # unless the settings say otherwise
        RUNS = Path("/content/drive/MyDrive/jaxchat-runs")
except ImportError:
    print(f"no drive to mount; runs are kept in {RUNS.resolve()}")"""
UPLOAD = """import shutil

TEXTS = RUNS / "texts"  # beside the run, which reads it again when it goes on
given = [Path(BOOK)] if BOOK else []
if not given and not TEXTS.exists():
    try:
        from google.colab import files

        given = [Path(name) for name in files.upload()]
    except ImportError:
        given = sorted(Path("/kaggle/input").rglob("*.txt"))
    if not given:
        raise SystemExit("no text: upload one, or set BOOK above to the path of a text file")
for path in given:
    if not path.is_file():
        raise SystemExit(f"{path} is no file: set BOOK above to the path of a text file")
    TEXTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, TEXTS)
print(*sorted(TEXTS.iterdir()), sep="\\n")"""


def train(name: str, *more: str) -> str:
    words = ['PYTHON, "launch.py"', f'"--tier", "{name}"', f'"--run-dir", RUNS / "{name}"', *more, "*SETTINGS"]
    return f"run({', '.join(words)})"


SLOWER = 'print(f"no GPU or TPU here: this takes about ten minutes on the CPU. To have one ({how}), start again")'
STOPS = """if not ON_CPU:
        raise SystemExit(f"no GPU or TPU here: choose one ({how}) and start again, or set ON_CPU = True (a day)")"""


SETTINGS_TEXT = ("## Settings", "## 설정")
START_TEXT = ("## The code", "## 코드")
INSTALL_TEXT = (
    "## Installation\n\nOne to five minutes. The packages go into an environment of their own, so those of the notebook stay as they are.\n"
    "The accelerator that is found decides which JAX is installed.",
    "## 설치\n\n1~5분 걸립니다. 패키지는 별도의 가상 환경에 설치하므로 노트북에 원래 있던 패키지는 바뀌지 않습니다. 발견한 가속기에 맞는\n"
    "JAX를 설치합니다.",
)
DOCTOR_TEXT = ("## What is this machine?", "## 어떤 기계인가요?")
DOCTOR = 'run(PYTHON, "launch.py", "doctor")'
TAKE_TEXT = (
    "## Take it home\n\nThe exported model as an archive; Colab downloads it, Kaggle lists it under Output when it lies in the working directory.\n"
    "`html/chat.html` in it runs the model in any browser, without a network. [What else can load it](weights.md).",
    "## 가져가기\n\n내보낸 모델을 압축 파일로 묶습니다. Colab에서는 바로 내려받고, Kaggle에서는 작업 디렉터리에 두면 Output에 나타납니다.\n"
    "그 안의 `html/chat.html`은 네트워크 없이 어느 브라우저에서나 모델을 실행합니다. [다른 방법](weights.md).",
)

NOTEBOOKS: dict[str, list[Cell]] = {
    "nano": [
        (
            "# nano: a chat model from nothing\n\nTokenizer, pretraining, SFT, reinforcement learning, exams and a report, in about ten minutes on any machine,\n"
            "with or without a GPU: [what it is](start.md). Run the cells from the top.",
            "# nano: 처음부터 만드는 채팅 모델\n\n토크나이저, 사전학습, SFT, 강화학습, 시험, 보고서까지 어느 기계에서든 10분쯤이면 끝납니다. GPU가 없어도 됩니다\n"
            "([설명](start.md)). 셀을 위에서부터 실행하세요.",
        ),
        SETTINGS_TEXT,
        (SETTINGS, "settings"),
        START_TEXT,
        (START, ""),
        INSTALL_TEXT,
        (INSTALL + SLOWER, "install"),
        (
            "## Train\n\nInterrupt the cell whenever you like (the run saves), and run it again: it goes on.",
            "## 학습\n\n아무 때나 셀을 중단해도 됩니다(실행이 저장합니다). 다시 실행하면 이어집니다.",
        ),
        (train("nano"), ""),
        (
            "## Look\n\nThe loss of pretraining, and the same questions before and after SFT. All scores are in `report.md` of the run.",
            "## 들여다보기\n\n사전학습의 손실 곡선, 그리고 같은 질문에 SFT 전과 후에 한 답. 점수는 모두 실행 디렉터리의 `report.md`에 있습니다.",
        ),
        (LOOK % ("nano", "nano/sft"), ""),
        (
            "## Talk to it\n\nDo not expect knowledge: it has read two million tokens of small talk.",
            "## 대화하기\n\n지식은 기대하지 마세요. 일상 대화 200만 토큰을 읽은 모델입니다.",
        ),
        (CHAT, ""),
        TAKE_TEXT,
        (TAKE % ("nano", "nano"), ""),
    ],
    "book": [
        (
            "# A model of your own book\n\nUpload a text in any language; the model is sized to it and writes on in its style: [what it is](small.md#book).\n"
            "About ten minutes for a book of 2 MB on two CPU cores, less on a GPU. Run the cells from the top.",
            "# 내 책으로 만드는 모델\n\n어떤 언어로 쓴 글이든 올리면 모델 크기를 글에 맞추고, 그 문체로 이어 쓰는 법을 배웁니다([설명](small.md)). 2 MB짜리 책이면\n"
            "CPU 코어 두 개로 10분쯤, GPU에서는 더 빨리 끝납니다. 셀을 위에서부터 실행하세요.",
        ),
        (
            '## Settings\n\nIf the text is not UTF-8, name its encoding: `["--set", "data.encoding=cp949"]`.',
            '## 설정\n\n글이 UTF-8이 아니면 인코딩을 적어 주세요: `["--set", "data.encoding=cp949"]`.',
        ),
        (
            SETTINGS
            + 'BOOK = ""  # path of a text file; empty: Colab asks for an upload, Kaggle takes the texts of its inputs\n',
            "settings",
        ),
        START_TEXT,
        (START, ""),
        ("## The book", "## 책"),
        (UPLOAD, "upload"),
        INSTALL_TEXT,
        (INSTALL + SLOWER, "install"),
        (
            "## Train\n\nThe line before the first stage says which size the text gets. Another book needs other `RUNS`.",
            "## 학습\n\n첫 단계 앞의 줄이 글에 맞춰 고른 크기를 알려 줍니다. 다른 책은 `RUNS`를 바꿔서 학습하세요.",
        ),
        (train("book", '"--data", f"files:{TEXTS}"'), ""),
        (
            "## Look\n\nThe loss, and openings that it never saw, continued before and after.",
            "## 들여다보기\n\n손실 곡선, 그리고 학습에 쓰지 않은 첫머리를 학습 전과 후에 이어 쓴 것.",
        ),
        (LOOK % ("book", "book/base"), ""),
        ("## Let it write", "## 이어 쓰게 하기"),
        (WRITE % ('"It was", "She said"', "book"), ""),
        TAKE_TEXT,
        (TAKE % ("book", "book"), ""),
    ],
    "tinystories": [
        (
            "# TinyStories on a hosted machine\n\nA model of 10 million parameters learns to tell small stories, on one hosted GPU or TPU: [what it is](small.md#tinystories). Run the\n"
            "cells from the top. The machine may be taken away at any time: start the notebook again on another one, and the training goes on\n"
            "from its newest checkpoint, at most 500 steps back, provided that the runs are kept on a drive.",
            "# 호스팅 장비에서 TinyStories\n\n매개변수 천만 개짜리 모델이 호스팅 GPU나 TPU 한 대에서 짧은 이야기를 쓰는 법을 배웁니다([설명](small.md#tinystories)). 셀을 위에서부터 실행하세요.\n"
            "기계는 언제든 회수될 수 있습니다. 실행 디렉터리를 드라이브에 두었다면 다른 기계에서 노트북을 다시 시작하면 됩니다. 학습은 가장 새로운\n"
            "체크포인트에서, 많아야 500스텝 뒤로 돌아가 이어집니다.",
        ),
        SETTINGS_TEXT,
        (SETTINGS + "ON_CPU = False  # train without a GPU or TPU too, for about a day\n", "settings"),
        (
            "## A drive that outlives the machine\n\nColab mounts Google Drive. On Kaggle, choose Persistence: Files only in the settings of the notebook.",
            "## 기계가 사라져도 남는 드라이브\n\nColab은 Google Drive를 연결합니다. Kaggle에서는 노트북 설정에서 Persistence를 Files only로 고르세요.",
        ),
        (DRIVE, "drive"),
        START_TEXT,
        (START, ""),
        INSTALL_TEXT,
        (INSTALL + STOPS, "install"),
        DOCTOR_TEXT,
        (DOCTOR, ""),
        (
            "## Train\n\nAbout 15 minutes on an A100, three hours on a T4, and as long again for Muon below. Interrupt the cell whenever you like (the run saves), and run it again: it goes on.",
            "## 학습\n\nA100에서 15분, T4에서 세 시간쯤 걸리고, 아래의 Muon도 그만큼 걸립니다. 아무 때나 셀을 중단해도 됩니다(실행이 저장합니다). 다시 실행하면 이어집니다.",
        ),
        (train("tinystories"), ""),
        (
            "## Look\n\nThe loss, and the same openings before and after.",
            "## 들여다보기\n\n손실 곡선, 그리고 같은 첫머리를 학습 전과 후에 이어 쓴 것.",
        ),
        (LOOK % ("tinystories", "tinystories/base"), ""),
        (
            "## Muon instead of AdamW\n\nThe same text, the same steps, the other optimizer; then both side by side, on the same documents.",
            "## AdamW 대신 Muon\n\n같은 글, 같은 스텝 수에 옵티마이저만 바꿉니다. 그다음 같은 문서로 둘을 나란히 비교합니다.",
        ),
        (
            'muon = ["--set", "optim.kind=muon"]\n'
            + train("tinystories", "*muon").replace('RUNS / "tinystories"', 'RUNS / "tinystories-muon"')
            + '\nrun(PYTHON, "launch.py", "compare", RUNS / "tinystories", RUNS / "tinystories-muon")',
            "",
        ),
        ("## Let it write", "## 이야기를 써 보게 하기"),
        (WRITE % ('"Once upon a time there was a robot who", "The little cat was sad because"', "tinystories"), ""),
        (
            "## What if it was interrupted?\n\nThe same command finds what is done. It does nothing now, and says so.",
            "## 중단됐다면?\n\n같은 명령이 끝난 일을 알아봅니다. 지금은 할 일이 없고, 그렇다고 말합니다.",
        ),
        (train("tinystories"), ""),
    ],
}


def badges(name: str, language: str) -> str:
    """Return the links that open the notebook in a hosted service; none before the repository has an address."""
    file = f"{ADDRESS}/blob/main/docs/{'ko/' if language == 'ko' else ''}{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{file.removeprefix('https://github.com/')}"
    links = [
        f"[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})",
        f"[![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src={file})",
    ]
    return "\n\n" + " ".join(links) if ADDRESS else ""


def notebook(name: str, language: str) -> str:
    """Return the notebook as the text of its file."""
    cells = []
    for number, (first, second) in enumerate(NOTEBOOKS[name]):
        common = {"id": f"cell-{number:02}", "metadata": {}}
        if first.startswith("#"):
            source = (first if language == "en" else second) + (badges(name, language) if number == 0 else "")
            cells.append({"cell_type": "markdown", **common, "source": source.splitlines(keepends=True)})
        else:
            common["metadata"] = {"tags": [second]} if second else {}
            source = first.strip().replace('REPOSITORY = ""', f'REPOSITORY = "{ADDRESS}"')
            empty = {"execution_count": None, "outputs": []}
            cells.append({"cell_type": "code", **common, **empty, "source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    for name in NOTEBOOKS:
        (DOCS / f"{name}.ipynb").write_text(notebook(name, "en"), encoding="utf-8")
        (DOCS / "ko" / f"{name}.ipynb").write_text(notebook(name, "ko"), encoding="utf-8")
