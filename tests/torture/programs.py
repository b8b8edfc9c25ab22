"""The programs that have to give the same results however late their files arrive: one table of real ones.

Each prints what it found out, and nothing that differs from run to run: no addresses, no times, no random numbers. They
run in a directory of their own, by the worker's interpreter, in the environment of `packhorse run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE = ("python3", "program.py")


@dataclass(frozen=True)
class Program:
    """A program: Python source, or another command that may use it as `program.py`."""

    name: str
    requirements: tuple[str, ...]
    """What it needs from the package index."""
    source: str = ""
    command: tuple[str, ...] = FILE
    quick: bool = False
    """Whether the ordinary tests run it: what it needs is small."""
    everything: bool = False
    """Whether it reads every large file."""
    whole: bool = False
    """Whether it reads libraries as data, so that they have to be whole: no code for GPUs left out."""


TREE_DIGEST = "tar --sort=name --format=gnu --mtime=@0 --numeric-owner --create {} | sha256sum"
"""Of trees: names, modes, links and every byte. Not their times: both programs look at them before they open a file, and
while bytes are written into one it has the time of the writing."""

SERVED = """
import http.client, json, signal, socket, subprocess, sys, time

def serve(*command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", *(word.replace("PORT", str(port)) for word in command)], stderr=subprocess.DEVNULL
    )
    answers = []
    while len(answers) < 8 and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("GET", "/")
            answers.append(connection.getresponse().read().decode())
        except ConnectionError:
            time.sleep(0.02)
        finally:
            connection.close()
    server.send_signal(signal.SIGTERM)
    print(answers, server.wait())
"""

PROCESSES = """
import multiprocessing, sys
import numpy

def work(number):
    from lxml import etree
    from PIL import Image
    tree = etree.fromstring(b"<a><b/>%d</a>" % number)
    colour = Image.new("RGB", (4, 4), (number, 0, 0)).resize((2, 2)).getpixel((0, 0))
    return round(float(numpy.linalg.norm(numpy.arange(number + 3.0))), 6), etree.tostring(tree).decode(), colour

if __name__ == "__main__":
    with multiprocessing.get_context("MODE").Pool(3) as pool:
        print(pool.map(work, range(9), chunksize=1))
"""

TORCH_PROCESSES = """
import multiprocessing

def work(number):
    import torch
    torch.set_num_threads(1)
    return torch.linalg.norm(torch.arange(4.0) + number).item()

if __name__ == "__main__":
    with multiprocessing.get_context("MODE").Pool(2) as pool:
        print([round(value, 4) for value in pool.map(work, range(4), chunksize=1)])
"""

QUICK = [
    Program(
        "numpy", ("numpy",), quick=True, source="""
import numpy
chance = numpy.random.default_rng(7)
matrix = chance.standard_normal((200, 200))
print(numpy.__version__, numpy.round(numpy.linalg.svd(matrix)[1][:5], 6).tolist(), numpy.show_config("dicts")["Build Dependencies"]["blas"]["name"])
print(numpy.round(numpy.abs(numpy.fft.rfft(matrix[0]))[:5], 6).tolist())
"""),
    Program(
        "pillow", ("pillow",), quick=True, source="""
import hashlib, io
from PIL import Image, ImageDraw, ImageFont, features
image = Image.effect_mandelbrot((200, 120), (-2, -1.2, 1, 1.2), 60).convert("RGB")
ImageDraw.Draw(image).text((10, 10), "packhorse", font=ImageFont.load_default(24), fill="red")
for form in ("png", "jpeg", "webp", "tiff", "avif"):
    kept = io.BytesIO()
    image.save(kept, form)
    print(form, hashlib.sha256(Image.open(kept).rotate(30).tobytes()).hexdigest())
print(features.get_supported())
"""),
    Program(
        "lxml", ("lxml",), quick=True, source="""
from lxml import etree, html, objectify
page = html.fromstring("<p>one<b>two</b></p>" * 50)
print(len(page.xpath("//b[text()='two']")), page.text_content()[:20])
sheet = etree.XSLT(etree.XML('<xsl:stylesheet version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform">'
    '<xsl:template match="/"><r><xsl:value-of select="count(//b)"/></r></xsl:template></xsl:stylesheet>'))
print(str(sheet(page.getroottree())), objectify.fromstring("<a><b>3</b></a>").b + 1, etree.LXML_VERSION, etree.LIBXML_VERSION)
"""),
    Program(
        "cryptography", ("cryptography",), quick=True, source="""
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
print(key.sign(b"packhorse").hex(), Scrypt(salt=b"salt", length=32, n=2**12, r=8, p=1).derive(b"word").hex())
print(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode())
locked = Fernet(b"A" * 43 + b"=").encrypt_at_time(b"text", 1)
print(Fernet(b"A" * 43 + b"=").decrypt(locked))
"""),
    Program(
        "multiprocessing, fork", ("numpy", "lxml", "pillow"), PROCESSES.replace("MODE", "fork"), quick=True
    ),
    Program(
        "multiprocessing, spawn", ("numpy", "lxml", "pillow"), PROCESSES.replace("MODE", "spawn"), quick=True
    ),
    Program(
        "multiprocessing, forkserver", ("numpy", "lxml", "pillow"), PROCESSES.replace("MODE", "forkserver"), quick=True
    ),
    Program(
        "threads that import at once", ("numpy", "lxml", "pillow", "cryptography"), quick=True, source="""
import importlib
from concurrent.futures import ThreadPoolExecutor
NAMES = ["lxml.etree", "PIL._imaging", "numpy", "cryptography.hazmat.bindings._rust", "PIL._imagingft"]
with ThreadPoolExecutor(len(NAMES)) as threads:
    print([module.__name__ for module in threads.map(importlib.import_module, NAMES)])
"""),
    Program(
        "a subprocess of a console script", ("numpy",), quick=True, source="""
import subprocess
for words in (["numpy-config", "--version"], ["f2py", "-v"]):
    done = subprocess.run(words, capture_output=True, text=True)
    print(words, done.returncode, done.stdout)
"""),
    Program(
        "python -I -S", ("numpy",), quick=True, command=("python3", "-I", "-S", "program.py"), source="""
import os, sys
print("numpy" in sys.modules, sys.flags.isolated, sys.flags.no_site)
sys.path.insert(0, os.environ["PACKHORSE_ROOT"] + "/packages")
import numpy
print(numpy.__version__, float(numpy.linalg.det(numpy.eye(9) * 2)))
"""),
    Program(
        "a static program, itself large, reads a large file", (), quick=True,
        command=("sh", "-c", '"$PACKHORSE_ROOT/deps/reader" "$PACKHORSE_ROOT/models/blob" && '
                 '"$PACKHORSE_ROOT/deps/reader" "$PACKHORSE_ROOT/models/blob" map'),
    ),
    Program(
        "a Rust program, ruff", ("ruff",), quick=True,
        command=("sh", "-c", "ruff --version && ruff check --isolated --no-cache --output-format=concise --select=F,E program.py; echo $?"),
        source="import os\nimport sys\nx = lambda: l\nif x == None: pass\n",
    ),
    Program(
        "a shell pipeline", ("numpy", "ruff"), everything=True, quick=True, whole=True,
        command=("sh", "-c", 'cd "$PACKHORSE_ROOT" && find packages deps models -type f -size +1023k | LC_ALL=C sort | '
                 "xargs head -qc 2000000 | gzip -n -1 | gzip -dc | tee /dev/stderr 2>/dev/null | wc -c && "
                 'cat packages/bin/ruff models/blob | sha256sum && dd if=models/blob bs=4096 skip=500 count=9 status=none | sha256sum'),
    ),
    Program(
        "many readers of one file", (), quick=True,
        command=("sh", "-c", 'for n in 1 2 3 4 5 6; do sha256sum < "$PACKHORSE_ROOT/models/blob" & done; wait'),
    ),
    Program(
        "stat, glob and list before anything is opened", ("numpy",), everything=True, quick=True, source="""
import os, pathlib
top = pathlib.Path(os.environ["PACKHORSE_ROOT"])
large = []
for directory in ("packages", "deps", "models"):
    for file in sorted((top / directory).rglob("*")):
        status = file.lstat()
        if file.is_file() and status.st_size >= 1 << 20:
            large.append(file)
            print(file.relative_to(top), status.st_size, oct(status.st_mode), os.access(file, os.X_OK))
for file in reversed(large):
    with file.open("rb") as opened:
        print(file.relative_to(top), os.fstat(opened.fileno()).st_mtime_ns, file.stat().st_size)
"""),
    Program(
        "memory maps and positional reads", (), quick=True, source="""
import hashlib, mmap, os
path = os.environ["PACKHORSE_ROOT"] + "/models/blob"
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    print(hashlib.sha256(mapped).hexdigest(), mapped[5_000_000:5_000_016].hex())
descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
print(os.pread(descriptor, 16, 7_000_000).hex(), os.lseek(descriptor, 0, os.SEEK_END))
"""),
    Program(
        "gunicorn", ("gunicorn", "lxml"), quick=True, source=SERVED + """
open("app.py", "w").write('''
def app(environ, respond):
    from lxml import etree
    respond("200 OK", [("Content-Type", "text/plain")])
    return [etree.tostring(etree.fromstring("<a><b/></a>"))]
''')
serve("gunicorn", "--no-control-socket", "--workers=3", "--bind=127.0.0.1:PORT", "app:app")
"""),
    Program(
        "uvicorn with workers", ("uvicorn", "numpy"), quick=True, source=SERVED + """
open("app.py", "w").write('''
import numpy
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(float(numpy.linalg.det(numpy.eye(3) * 2))).encode()})
''')
serve("uvicorn", "--workers=2", "--lifespan=off", "--no-access-log", "--port=PORT", "app:app")
"""),
    Program(
        "cp -a", (), quick=True, whole=True,
        command=("bash", "-c", 'set -o pipefail; cp -a "$PACKHORSE_ROOT/packages" copy && cd copy && ' + TREE_DIGEST.format("*")),
    ),
    Program(
        "tar, until it is let in", (), everything=True, quick=True, whole=True,
        # tar opens with O_NONBLOCK. Such an open is not held back but refused (fcntl(2)): tar says so and ends with 2,
        # the file is brought, and the next try finds it.
        # Of deps/ only what was pushed: triton and torch keep there what they compiled.
        command=("bash", "-c", 'set -o pipefail; cd "$PACKHORSE_ROOT"; until '
                 + TREE_DIGEST.format("packages/* deps/reader models/*") + ' > "$TMPDIR/digest"; do :; done; cat "$TMPDIR/digest"'),
    ),
]  # fmt: skip

HEAVY = [
    Program(
        "pandas", ("pandas",), source="""
import pandas
frame = pandas.DataFrame({"when": pandas.date_range("2024-01-01", periods=1000, freq="h"), "value": range(1000)})
print(frame.groupby(frame.when.dt.dayofweek).value.agg(["sum", "mean", "std"]).round(6).to_csv())
print(frame.resample("7D", on="when").value.sum().to_json(), frame.merge(frame, on="value").shape)
"""),
    Program(
        "torch", ("torch",), source="""
import torch
torch.manual_seed(7)
layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8))
given = torch.randn(16, 64)
loss = layers(given).pow(2).mean()
loss.backward()
print(torch.__version__, torch.cuda.is_available(), torch.backends.mkldnn.is_available(), torch.distributed.is_available())
print(round(loss.item(), 5), [round(float(value.grad.norm()), 4) for value in layers.parameters()])
print(round(torch.linalg.svdvals(given).sum().item(), 3), round(torch.fft.rfft(given).abs().sum().item(), 2))
print(torch.jit.script(torch.nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist())
"""),
    Program(
        "torch, every library loaded", ("torch",), source="""
import ctypes, os, pathlib
import torch
top = pathlib.Path(os.environ["PACKHORSE_ROOT"], "packages")
for library in sorted(top.glob("nvidia/**/*.so*")):
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)
        told = "loaded"
    except OSError as error:
        told = str(error).replace(str(top), "")
    print(library.relative_to(top), told)
"""),
    Program("torch in processes, fork", ("torch",), TORCH_PROCESSES.replace("MODE", "fork")),
    Program("torch in processes, spawn", ("torch",), TORCH_PROCESSES.replace("MODE", "spawn")),
    Program(
        "torchvision", ("torchvision",), source="""
import torch, torchvision
from torchvision import ops
from torchvision.transforms import v2
torch.manual_seed(7)
model = torchvision.models.resnet18().eval()
with torch.no_grad():
    print([round(value, 2) for value in model(torch.randn(1, 3, 64, 64))[0, :5].tolist()])
boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
print(ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist())
image = (torch.arange(3 * 32 * 32) % 256).reshape(3, 32, 32).to(torch.uint8)
print(torchvision.io.decode_png(torchvision.io.encode_png(image)).sum().item(), v2.functional.resize(image, [8, 8], antialias=True).sum().item())
"""),
    Program(
        "transformers", ("transformers",), source="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(7)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
told = model.generate(torch.tensor([[1, 5, 9]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=8, do_sample=False, pad_token_id=0)
print(type(model).__name__, sum(value.numel() for value in model.parameters()), told.tolist())
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
words = Tokenizer(models.BPE(unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.train_from_iterator(["a pack horse carries a pack"] * 4, trainers.BpeTrainer(vocab_size=40, special_tokens=["?"], show_progress=False))
print(words.encode("a horse").tokens)
"""),
    Program(
        "accelerate", ("accelerate",), source="""
import torch
from accelerate import Accelerator, init_empty_weights
torch.manual_seed(7)
accelerator = Accelerator(cpu=True)
model, data = torch.nn.Linear(4, 2), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), data)
for batch in data:
    loss = model(batch).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    print(round(loss.item(), 5), accelerator.device)
with init_empty_weights():
    print(torch.nn.Linear(100, 100).weight.device)
"""),
    Program(
        "triton, compiled for a GPU that is not here", ("triton",), source="""
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)

if __name__ == "__main__":
    source = ASTSource(add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={(4,): 256})
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(triton.__version__, sorted(done.asm))
    print(sorted(set(re.findall(r"(?:ld|st|add)[.]\\S+", done.asm["ptx"]))), len(done.asm["cubin"]) > 1000)
"""),
    Program(
        "triton, interpreted", ("triton", "numpy"), source="""
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton
import triton.language as tl

@triton.jit
def double(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * 2)

given, out = torch.arange(16.0), torch.zeros(16)
double[(1,)](given, out, BLOCK=16)
print(out.tolist())
"""),
    Program(
        "scikit-learn", ("scikit-learn",), source="""
from sklearn import datasets, ensemble, linear_model, metrics, model_selection, svm
given, wanted = datasets.load_digits(return_X_y=True)
parts = model_selection.train_test_split(given, wanted, random_state=7)
for model in (linear_model.Ridge(), svm.SVC(), ensemble.HistGradientBoostingClassifier(max_iter=5, random_state=7), ensemble.RandomForestClassifier(10, random_state=7, n_jobs=2)):
    print(type(model).__name__, round(model.fit(parts[0], parts[2]).score(parts[1], parts[3]), 4))
"""),
    Program(
        "opencv", ("opencv-python-headless",), source="""
import hashlib
import cv2, numpy
image = (numpy.indices((120, 160)).sum(axis=0) % 256).astype(numpy.uint8)
cv2.putText(image, "packhorse", (5, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255)
print(cv2.__version__, cv2.Canny(image, 50, 150).sum(), cv2.GaussianBlur(image, (5, 5), 1).sum())
for form in (".png", ".jpg", ".webp"):
    kept = cv2.imencode(form, image)[1]
    print(form, hashlib.sha256(cv2.imdecode(kept, 0).tobytes()).hexdigest())
print(len(cv2.ORB_create().detectAndCompute(image, None)[0]))
"""),
    Program(
        "scipy", ("scipy",), source="""
import numpy
from scipy import fft, integrate, interpolate, linalg, ndimage, optimize, signal, sparse, spatial, special, stats
from scipy.sparse.linalg import eigsh
print(round(optimize.minimize(lambda x: ((x - 3) ** 2).sum(), numpy.zeros(3)).fun, 6), integrate.quad(numpy.sin, 0, numpy.pi)[0])
print(eigsh(sparse.diags([1.0, 2, 3, 4, 5, 6, 7]), 2, v0=numpy.ones(7))[0].round(6).tolist(), round(float(stats.norm.ppf(0.975)), 6), round(float(special.gamma(5.5)), 6))
print(spatial.ConvexHull(numpy.random.default_rng(7).random((50, 2))).volume > 0, round(float(linalg.expm(numpy.eye(2))[0, 0]), 6))
print(optimize.linprog([-1, -2], A_ub=[[1, 1]], b_ub=[4]).x.tolist(), round(float(ndimage.gaussian_filter(numpy.eye(9), 1).sum()), 6))
"""),
    Program(
        "soundfile", ("soundfile",), source="""
import io
import numpy, soundfile
tone = numpy.sin(numpy.arange(8000) / 9).astype("float32")
for form in ("WAV", "FLAC", "OGG"):
    kept = io.BytesIO()
    soundfile.write(kept, tone, 8000, format=form)
    kept.seek(0)
    again, rate = soundfile.read(kept)
    print(form, rate, len(again), round(float(numpy.abs(again).sum()), 1))
print(soundfile.__libsndfile_version__)
"""),
    Program(
        "matplotlib", ("matplotlib",), source="""
import hashlib, io, warnings
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
figure, (left, right) = pyplot.subplots(1, 2)
left.plot([1, 4, 9], label="$x^2$")
left.legend()
right.imshow([[1, 2], [3, 4]])
figure.canvas.draw()
print(matplotlib.__version__, hashlib.sha256(bytes(figure.canvas.buffer_rgba())).hexdigest())
kept = io.StringIO()
matplotlib.rcParams["svg.hashsalt"] = "salt"
figure.savefig(kept, format="svg", metadata={"Date": None})
print(hashlib.sha256(kept.getvalue().encode()).hexdigest())
"""),
    Program(
        "grpc", ("grpcio",), source="""
from concurrent import futures
import grpc
def answer(request, context):
    return request[::-1]
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"reverse": grpc.unary_unary_rpc_method_handler(answer)}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    print(grpc.__version__, channel.unary_unary("/s/reverse")(b"packhorse", timeout=30, wait_for_ready=True))
server.stop(None).wait()
"""),
    Program(
        "numba", ("numba",), source="""
import numba, numpy
@numba.njit(parallel=True)
def total(values):
    found = 0.0
    for n in numba.prange(len(values)):
        found += values[n] ** 0.5
    return found
@numba.vectorize(["float64(float64)"])
def cube(value):
    return value ** 3
print(numba.__version__, round(total(numpy.arange(1000.0)), 6), cube(numpy.arange(3.0)).tolist())
"""),
    Program(
        "polars", ("polars",), source="""
import polars
frame = polars.DataFrame({"key": ["a", "b", "a"] * 100, "value": range(300)})
print(polars.__version__, frame.lazy().group_by("key").agg(polars.col("value").sum(), polars.col("value").std().round(6).alias("std")).sort("key").collect().rows())
frame.write_parquet("frame.parquet")
print(polars.scan_parquet("frame.parquet").filter(polars.col("value") > 290).collect().rows())
"""),
    Program(
        "pyarrow", ("pyarrow",), source="""
import pyarrow, pyarrow.compute, pyarrow.dataset, pyarrow.flight, pyarrow.parquet
table = pyarrow.table({"key": list(range(1000)), "text": [str(n) for n in range(1000)]})
pyarrow.parquet.write_table(table, "table.parquet", compression="zstd")
found = pyarrow.dataset.dataset("table.parquet").to_table(filter=pyarrow.compute.field("key") > 995)
print(pyarrow.__version__, found.to_pylist(), pyarrow.compute.sum(table["key"]).as_py())
"""),
    Program(
        "onnxruntime", ("onnxruntime",), source="""
import numpy, onnxruntime

# A graph that adds its input to itself, in the bytes of protobuf: field number and type, length, content.
def field(number, content):
    return bytes([number << 3 | 2, len(content)]) + content
def value(name):
    return field(1, name) + field(2, field(1, b"\\x08\\x01" + field(2, field(1, b"\\x08\\x03"))))
node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
graph = field(1, node) + field(2, b"g") + field(11, value(b"x")) + field(12, value(b"y"))
model = b"\\x08\\x08" + field(7, graph) + field(8, b"\\x10\\x11")
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
print(onnxruntime.__version__, session.run(None, {"x": numpy.array([1, 2, 3], "float32")})[0].tolist())
"""),
    Program(
        "a runpod handler", ("runpod",), source="""
import runpod
from runpod.serverless.modules import rp_fastapi
print(runpod.__version__.split(".")[0], rp_fastapi.WorkerAPI.__name__)
"""),
    Program("console scripts of torch", ("torch",), source="""
import subprocess
for words in (["torchrun", "--help"], ["accelerate", "env", "--help"], ["transformers", "--help"]):
    done = subprocess.run(words, capture_output=True, text=True)
    print(words[0], done.returncode, len(done.stdout) > 100)
"""),
]  # fmt: skip

PROGRAMS = [*QUICK, *HEAVY]

_ON_GPU = ("python3", str(Path(__file__).with_name("on_gpu.py")))
ON_GPU = [
    *(Program(f"{name} on a GPU", ("torch",), command=(*_ON_GPU, name)) for name in ("products", "networks", "algebra")),
    Program("models on a GPU", ("torch", "torchvision", "transformers"), command=(*_ON_GPU, "models")),
    *(
        Program(f"torch's operators, {shard + 1} of 8", ("torch", "expecttest"), command=(*_ON_GPU, "operators", f"{shard}/8"))
        for shard in range(8)
    ),
]  # fmt: skip
"""Programs for machines with a GPU, of which none are run where there is none."""
