"""The server: answers equal to `predict`'s, whoever else asks; hostile requests are told off."""

import base64
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http
from PIL import Image

from adavipro_fast import AdaViPro, PromptConfig, open_artifact, predict
from adavipro_fast.export import onnx_export, to_task
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.to_task import TaskConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.predict import PredictConfig
from adavipro_fast.serve import ServeConfig, named, prepared
from adavipro_fast.serving import connections
from adavipro_fast.serving.batcher import Batcher, FullError, Job, RetryError

NAMES = {"shapes": ("disc", "ring", "star"), "signs": ("yes", "no")}
TOKEN = "a-token-of-a-test-0123"


@pytest.fixture(scope="module")
def files(demo_clip, tmp_path_factory):
    """A checkpoint a task, an open file and its tasks."""
    root, (encoder, text) = tmp_path_factory.mktemp("served"), demo_clip
    torch.manual_seed(5)
    for task, names in NAMES.items():
        config = PromptConfig(embed_dim=4, edge="laplacian-magnitude", edge_padding="replicate")
        model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), config)
        quantiles = tuple(torch.linspace(0.3, 1, 101).tolist())
        checkpoint = replace(checkpoint_of(model, names), calibration=Calibration(2.0, quantiles))
        checkpoint.save(root / task / "checkpoint.safetensors")
    path = root / "shapes" / "checkpoint.safetensors"
    onnx_export.export(OnnxConfig(path, root / "open.onnx", tasks="open", input="uint8"))
    for task in NAMES:
        path = root / task / "checkpoint.safetensors"
        to_task.command(TaskConfig(path, root / f"{task}.task"))
    return root


@contextmanager
def running(*artifacts, **settings):
    """Serve in a thread of this process."""
    server = prepared(ServeConfig(tuple(map(str, artifacts)), port=0, device=("cpu",), **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.uvicorn.started:
            time.sleep(0.01)
        yield server
    finally:
        server.uvicorn.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(files):
    """Both checkpoints and the open file with one of its tasks."""
    tasks = files / "tasks"
    tasks.mkdir()
    shutil.copy(files / "shapes.task", tasks)
    with running(
        files / "shapes" / "checkpoint.safetensors",
        f"more={files / 'open.onnx'}",
        tasks_folder=tasks,
        images=8,
        body_mb=2.9,
        image_megapixels=1.0,
    ) as running_server:
        yield running_server


@pytest.fixture
def images(folder):
    return sorted((folder / "test").rglob("*.*"))[:6]


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)


def post(server, path="/classify", **request):
    return httpx.post(server.address + path, timeout=30, **request)


def tensor(name, values, datatype):
    given = tritonclient.http.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values)
    return given


def client(server, **options):
    return tritonclient.http.InferenceServerClient(server.address.split("//")[1], **options)


def test_answers_are_those_of_predict(server, files, images):
    path = files / "shapes" / "checkpoint.safetensors"
    expected = predict.command(PredictConfig(path, tuple(images), reject=0.5, device="cpu"))
    sent = [("image", (image.name, image.read_bytes())) for image in images]
    answer = post(server, files=sent, params={"reject": 0.5})
    assert answer.status_code == 200
    for mine, theirs in zip(answer.json()["predictions"], expected["predictions"], strict=True):
        assert mine["file"] == theirs["path"].split("/")[-1]
        assert (mine["answer"], mine["mask"]) == (theirs["answer"], theirs["mask"])
        for a, b in zip(mine["classes"], theirs["classes"], strict=True):
            assert a["name"] == b["name"]
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)
    bare = post(server, content=images[0].read_bytes(), params={"top": 1})
    assert len(bare.json()["predictions"][0]["classes"]) == 1


def test_a_task_is_named_in_the_address(server, images):
    asked = {"model": "more", "task": "shapes"}
    answer = post(server, content=images[0].read_bytes(), params=asked)
    assert answer.json()["predictions"][0]["answer"] in NAMES["shapes"]
    missing = post(server, content=images[0].read_bytes(), params={"model": "more"})
    assert missing.status_code == 400
    assert "names no task; the file holds shapes" in missing.json()["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_works_unchanged(server, files, pixels, images, binary):
    triton = client(server)
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("shapes")
    assert [m["name"] for m in triton.get_model_repository_index()][:2] == [
        "shapes", "shapes_classify"
    ]  # fmt: skip
    assert triton.get_model_metadata("more")["inputs"][1]["name"] == "task"
    expected = open_artifact(files / "shapes" / "checkpoint.safetensors", device="cpu")(pixels)
    given = tritonclient.http.InferInput("image", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels.numpy(), binary_data=binary)
    outputs = [
        tritonclient.http.InferRequestedOutput(name, binary_data=binary)
        for name in ("mask", "logits", "embedding")
    ]
    result = triton.infer("shapes", [given], outputs=outputs, request_id="7")
    assert result.get_response()["id"] == "7"
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, atol=1e-4)
    np.testing.assert_array_equal(result.as_numpy("mask"), expected.mask)
    tasks = tensor("task", np.array([b"shapes"] * 5, dtype=object), "BYTES")
    result = triton.infer("more", [given, tasks])
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, atol=1e-4)
    encoded = np.array([image.read_bytes() for image in images], dtype=object)
    result = triton.infer("shapes_classify", [tensor("encoded", encoded, "BYTES")])
    assert {name.decode() for name in result.as_numpy("class")} <= set(NAMES["shapes"])
    assert result.as_numpy("probability").shape == (6,)
    with pytest.raises(tritonclient.utils.InferenceServerException, match=r"image.*expected"):
        triton.infer("shapes", [tensor("image", np.zeros((1, 3, 8, 8), np.uint8), "UINT8")])


def infer(values, rest=b"", length=None):
    head = values if isinstance(values, bytes) else json.dumps(values).encode()
    headers = {connections_header(): str(len(head) if length is None else length)} if rest else {}
    return {"content": head + rest, "headers": headers}


def connections_header():
    return "Inference-Header-Content-Length"


IMAGE = {"name": "image", "shape": [1, 3, 224, 224], "datatype": "UINT8"}
BAD = {
    "no JSON": (b"{", 400),
    "deep": (b"[" * 100_000, 400),
    "a list": (b"[]", 400),
    "nothing": ({}, 400),
    "no list": ({"inputs": {"a": 1}}, 400),
    "unknown input": ({"inputs": [IMAGE | {"name": "../../etc/passwd"}]}, 400),
    "twice": ({"inputs": [IMAGE | {"data": []}] * 2}, 400),
    "many": ({"inputs": [IMAGE] * 1000}, 400),
    "no data": ({"inputs": [IMAGE]}, 400),
    "few data": ({"inputs": [IMAGE | {"data": [1, 2]}]}, 400),
    "other dtype": ({"inputs": [IMAGE | {"datatype": "FP32", "data": []}]}, 400),
    "no text": ({"inputs": [IMAGE | {"datatype": "\ud800" * 999}]}, 400),
    "a number as shape": ({"inputs": [IMAGE | {"shape": 3}]}, 400),
    "true as size": ({"inputs": [IMAGE | {"shape": [True, 3, 224, 224]}]}, 400),
    "negative": ({"inputs": [IMAGE | {"shape": [-1, 3, 224, 224], "data": []}]}, 400),
    "huge": ({"inputs": [IMAGE | {"shape": [10**12, 3, 224, 224], "data": []}]}, 400),
    "empty": ({"inputs": [IMAGE | {"shape": [0, 3, 224, 224], "data": []}]}, 400),
    "bytes that are not there": (
        {"inputs": [IMAGE | {"parameters": {"binary_data_size": 10**9}}]},
        400,
    ),
    "parameters": ({"inputs": [IMAGE | {"parameters": 3}]}, 400),
    "beyond a byte": (
        {"inputs": [{"name": "image", "shape": [1, 3, 224, 224], "datatype": "UINT8",
                     "data": [256] * (3 * 224 * 224)}]},
        400,
    ),
    "words": ({"inputs": [IMAGE | {"data": ["a"] * (3 * 224 * 224)}]}, 400),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_told_in_one_line(server, case):
    values, status = BAD[case]
    answer = post(server, "/v2/models/shapes/infer", **infer(values))
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.text


def test_wrong_bytes_behind_a_request_are_told(server, pixels):
    size = {"parameters": {"binary_data_size": 3 * 224 * 224}}
    whole = {"inputs": [IMAGE | size]}
    for rest, length, said in (
        (bytes(10), None, "bytes, but 10 are left"),
        (bytes(3 * 224 * 224 + 1), None, "1 bytes follow"),
        (bytes(10), 10**9, "the body has"),
        (bytes(10), "x", "is not a number"),
    ):
        answer = post(server, "/v2/models/shapes/infer", **infer(whole, rest, length))
        assert answer.status_code == 400
        assert said in answer.json()["error"]
    wanted = whole | {"outputs": [{"name": "secret"}]}
    answer = post(server, "/v2/models/shapes/infer", **infer(wanted, bytes(3 * 224 * 224)))
    assert "output 'secret' is unknown; use logits" in answer.json()["error"]


def bomb(side):
    content = io.BytesIO()
    Image.new("1", (side, side)).save(content, "PNG")
    return content.getvalue()


def test_images_that_cannot_be_read_are_told(server, images):
    good = images[0].read_bytes()
    for content, status in (
        (b"no image", 400),
        (good[:200], 400),
        (bomb(1200), 400),
        (b"", 400),
        (bytes(3_000_000), 413),
    ):
        answer = post(server, content=content)
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
    many = [("image", ("a.png", good))] * 9
    assert post(server, files=many).status_code in (400, 413)
    broken = [("image", ("b.png", b"no image"))]
    assert "'b.png'" in post(server, files=broken).json()["error"]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert post(server, content=b"--y\r\n", headers=headers).status_code == 400
    assert post(server, content=good, headers={"Content-Encoding": "gzip"}).status_code == 415
    assert post(server, content=good, params={"top": 0}).status_code == 400
    assert post(server, content=good, params={"top": "many"}).status_code == 400
    assert post(server, content=good, params={"reject": 2}).status_code == 400
    assert post(server, content=good, params={"model": "../x"}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/v2/models/none", "/v2/models/shapes/versions/2", "/v2/models/%2e%2e%2fx/infer", "/x"]
)
def test_what_is_not_there_is_not_found(server, path):
    answer = httpx.get(server.address + path)
    assert answer.status_code in (404, 405)
    assert list(answer.json()) == ["error"]


def test_metrics_count_by_route_and_never_by_what_a_client_wrote(server, images):
    post(server, content=images[0].read_bytes())
    httpx.get(server.address + "/" + "x" * 50)
    text = httpx.get(server.address + "/metrics").text
    assert 'adavipro_requests_total{code="200",route="/classify"}' in text
    assert "adavipro_batch_images_bucket" in text
    assert "xxxx" not in text


def test_openapi_describes_the_routes(server):
    described = httpx.get(server.address + "/openapi.json").json()
    assert "/classify" in described["paths"]
    assert "multipart/form-data" in json.dumps(described["paths"]["/classify"])


def test_nobody_without_the_token_gets_in(files, images):
    secret = files / "token"
    secret.write_text(TOKEN + "\n")
    with running(files / "shapes" / "checkpoint.safetensors", token_file=secret) as server:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}):
            for path in ("/classify", "/v2/models/shapes/infer", "/metrics", "/docs", "/"):
                answer = post(server, path, content=images[0].read_bytes(), headers=headers)
                assert answer.status_code == 401
        assert httpx.get(server.address + "/v2/health/live").status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert post(server, content=images[0].read_bytes(), headers=right).status_code == 200


def test_other_addresses_need_a_token(files, tmp_path):
    path = str(files / "shapes" / "checkpoint.safetensors")
    for host in ("0.0.0.0", "::", "example"):
        with pytest.raises(ValueError, match="is reachable from other machines; add --token-file"):
            prepared(ServeConfig((path,), host=host, port=0))
    secret = tmp_path / "token"
    secret.write_text("short")
    with pytest.raises(ValueError, match="contains no valid token"):
        prepared(ServeConfig((path,), port=0, token_file=secret))


def test_bad_settings_are_refused(files):
    path = str(files / "shapes" / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="two files have the name 'shapes'"):
        prepared(ServeConfig((path, path), port=0))
    with pytest.raises(ValueError, match="no file given"):
        prepared(ServeConfig((), port=0))
    with pytest.raises(ValueError, match="--tasks-folder needs a file that was exported"):
        prepared(ServeConfig((path,), port=0, tasks_folder=files))
    with pytest.raises(ValueError, match="cannot be used in a URL"):
        named("a/b=x.onnx")
    with pytest.raises(ValueError, match="queue is 0"):
        ServeConfig((path,), queue=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="--port"):
        prepared(ServeConfig((path,), port=taken.getsockname()[1]))


def test_tasks_and_files_are_taken_up_while_it_runs(files, tmp_path, images):
    file, tasks = tmp_path / "f.safetensors", tmp_path / "tasks"
    tasks.mkdir()
    shutil.copy(files / "shapes" / "checkpoint.safetensors", file)
    shutil.copy(files / "open.onnx", tmp_path / "open.onnx")
    with running(f"one={file}", tmp_path / "open.onnx", tasks_folder=tasks) as server:
        ask = {"content": images[0].read_bytes(), "params": {"model": "open", "task": "signs"}}
        assert post(server, **ask).status_code == 400
        shutil.copy(files / "signs.task", tasks)
        (tasks / "broken.task").write_bytes(b"no task")
        assert until(lambda: post(server, **ask).status_code == 200)
        (tasks / "signs.task").unlink()
        assert until(lambda: post(server, **ask).status_code == 400)
        one = {"content": images[0].read_bytes()}
        assert post(server, **one).json()["predictions"][0]["answer"] in NAMES["shapes"]
        # What is half written is told, and the file before goes on.
        file.write_bytes(b"half")
        time.sleep(1.5)
        assert post(server, **one).json()["predictions"][0]["answer"] in NAMES["shapes"]
        shutil.copy(files / "signs" / "checkpoint.safetensors", tmp_path / "new")
        (tmp_path / "new").replace(file)
        assert until(
            lambda: post(server, **one).json()["predictions"][0]["answer"] in NAMES["signs"]
        )
        assert httpx.get(server.address + "/v2/models/one").json()["versions"] == ["2"]


def until(holds, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


class Slow:
    """An artifact that waits until it may go on."""

    def __init__(self, artifact):
        self.artifact, self.go, self.sizes = artifact, threading.Event(), []

    @property
    def about(self):
        return self.artifact.about

    def __call__(self, pixels, task=None):
        self.go.wait()
        self.sizes.append(len(pixels))
        return self.artifact(pixels, task)


@pytest.fixture
def slow(files):
    artifact = Slow(open_artifact(files / "shapes" / "checkpoint.safetensors", device="cpu"))
    yield artifact
    artifact.go.set()


def test_a_full_queue_refuses_at_once(files, slow, images):
    with running(files / "shapes" / "checkpoint.safetensors", queue=4, images=4, batch=2) as server:
        served = server.served[0]
        served.now = type(served.now)((slow,), 1)
        content = images[0].read_bytes()
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(post, server, content=content) for _ in range(4)]
            assert until(lambda: server.batcher.held == 4)
            began = time.perf_counter()
            refused = post(server, content=content)
            assert time.perf_counter() - began < 0.5
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            slow.go.set()
            assert all(answer.result().status_code == 200 for answer in waiting)
        assert server.batcher.held == 0
        assert sum(slow.sizes) == 4
        assert max(slow.sizes) == 2


def test_a_sender_that_takes_its_time_is_sent_away(files, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with running(files / "shapes" / "checkpoint.safetensors", seconds=0.3) as server:
        address = server.listening.getsockname()[:2]
        with socket.create_connection(address) as slow_headers:
            slow_headers.sendall(b"GET / HTTP/1.1\r\nHost:")
            slow_headers.settimeout(10)
            assert slow_headers.recv(100) == b""
        with socket.create_connection(address) as slow_body:
            slow_body.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab")
            slow_body.settimeout(10)
            assert b" 408 " in slow_body.recv(1000)
        assert until(lambda: server.batcher.held == 0)


def test_every_request_gets_its_own_answer_whatever_batch_it_rides_in(files, pixels):
    artifact = open_artifact(files / "open.onnx", device="cpu")
    for task in NAMES:
        artifact.add(files / f"{task}.task")
    sizes, draw = [], random.Random(0)
    batcher = Batcher(largest=8, delay=0.05, room=10_000, on_batch=sizes.append)
    jobs = []
    for _ in range(40):
        rows = torch.tensor([draw.randrange(5) for _ in range(draw.randint(1, 3))])
        tasks = [draw.choice(list(NAMES)) for _ in rows]
        jobs.append((rows, Job((artifact,), pixels[rows], tasks)))
    gone = Job((artifact,), pixels, ["shapes"] * 5)
    wrong = Job((artifact,), pixels, ["removed"] * 5)
    gone.answer.cancel()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(batcher.submit, [gone, *(job for _, job in jobs), wrong]))
    alone = {task: artifact(pixels, task) for task in NAMES}
    for rows, job in jobs:
        got = job.answer.result(30)
        for place, (row, task) in enumerate(zip(rows.tolist(), job.tasks, strict=True)):
            own = alone[task]
            count = len(NAMES[task])
            torch.testing.assert_close(got.embedding[place], own.embedding[row], rtol=0, atol=1e-5)
            torch.testing.assert_close(
                got.logits[place, :count], own.logits[row], rtol=0, atol=1e-3
            )
            assert torch.equal(got.mask[place], own.mask[row])
    with pytest.raises(ValueError, match="requests 'removed'"):
        wrong.answer.result(30)
    batcher.close()
    assert max(sizes) > 3
    with pytest.raises(RetryError, match="is stopping"):
        batcher.submit(gone)
    with pytest.raises(FullError), batcher.place(10_001):
        pass


def test_requests_for_two_files_ride_in_batches_of_their_own(files, pixels):
    artifacts = [
        (open_artifact(files / task / "checkpoint.safetensors", device="cpu"),) for task in NAMES
    ]
    sizes = []
    batcher = Batcher(largest=8, delay=0.2, room=100, on_batch=sizes.append)
    jobs = [Job(artifacts[number % 2], pixels[:1], None) for number in range(16)]
    for job in jobs:
        batcher.submit(job)
    shapes = [job.answer.result(30).logits.shape[1] for job in jobs]
    batcher.close()
    assert shapes == [3, 2] * 8
    assert sizes == [8, 8]


def spawned(files, *flags):
    command = [sys.executable, "-m", "adavipro_fast.serve", f"m={files / 'open.onnx'}"]
    more = ["--port", "0", "--device", "cpu", "--tasks-folder", str(files)]
    process = subprocess.Popen(
        [*command, *more, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("serving"):
            return process, line.split(" at ")[1].split(";")[0]
    raise AssertionError(process.wait())


def test_a_stopped_server_answers_what_it_took(files, images):
    process, address = spawned(files)
    try:
        url = f"{address}/classify?model=m&task=signs"
        content = images[0].read_bytes()
        with ThreadPoolExecutor(16) as pool:
            sent = [pool.submit(httpx.post, url, content=content, timeout=30) for _ in range(64)]
            until(lambda: sum(s.done() for s in sent) > 8)
            process.send_signal(signal.SIGTERM)
            # Those that came after the signal find nobody, or are reset before they are read: what
            # the server took is what it counted.
            answers = [
                request.result()
                for request in sent
                if not isinstance(request.exception(), httpx.ConnectError | httpx.ReadError)
            ]
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert len(answers) > 8
    assert all(answer.status_code == 200 for answer in answers)
    assert json.loads(out.splitlines()[-1])["requests"] == len(answers)
    assert "Traceback" not in err


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_request_is_lost_or_answered_twice(files, images):
    """10,000 requests, 100 clients that hang up, 20 servers that are killed and started again."""
    draw = random.Random(0)
    contents = [image.read_bytes() for image in images]
    expected, sent, answered, gone = {}, 0, 0, 0
    for _ in range(20):
        process, address = spawned(files)
        url = f"{address}/classify?model=m&task=shapes&top=1"
        host, _, port = address.removeprefix("http://").rpartition(":")
        for number, content in enumerate(contents):
            expected[number] = httpx.post(url, content=content).json()["predictions"][0]
        with httpx.Client(limits=httpx.Limits(max_connections=16)) as session:

            def ask(number, session=session, url=url):
                answer = session.post(url, content=contents[number], timeout=60)
                assert answer.status_code == 200
                (got,) = answer.json()["predictions"]
                assert got["answer"] == expected[number]["answer"]
                own = expected[number]["classes"][0]["probability"]
                assert got["classes"][0]["probability"] == pytest.approx(own, abs=1e-5)

            with ThreadPoolExecutor(16) as pool:
                asked = [pool.submit(ask, draw.randrange(len(contents))) for _ in range(500)]
                sent += len(asked)
                for _ in range(5):
                    with socket.create_connection((host, int(port))) as client:
                        head = (
                            f"POST /classify?model=m HTTP/1.1\r\nHost: a\r\nContent-Length: {9**5}"
                        )
                        client.sendall(f"{head}\r\n\r\n".encode() + bytes(draw.randrange(9**4)))
                        gone += 1
                for request in asked:
                    request.result()
                    answered += 1
            held = session.get(f"{address}/metrics").text
        assert "adavipro_images_held 0.0" in held or until(
            lambda a=address: "adavipro_images_held 0.0" in httpx.get(f"{a}/metrics").text
        )
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
    assert (sent, answered, gone) == (10_000, 10_000, 100)


def hostile(draw, good):
    """Make one request that should be refused: method, path, headers, body."""
    kind = draw.randrange(7)
    names = ("m", "../m", "m%00", "%2e%2e", "a" * 3000, "m/../../etc/passwd", "m_classify")
    infer_path = f"/v2/models/{draw.choice(names)}/infer"
    if kind == 0:
        return "POST", infer_path, {}, bytes(draw.randrange(256) for _ in range(draw.randrange(99)))
    if kind == 1:
        shape = [draw.choice([-1, 0, 1, 2**40, 3, 224, 1.5, None, "3"]) for _ in range(4)]
        entry = {"name": "image", "shape": shape, "datatype": draw.choice(["UINT8", "FP32", 3])}
        if draw.random() < 0.5:
            entry["parameters"] = {"binary_data_size": draw.choice([-1, 10**12, "x", 10])}
        else:
            entry["data"] = draw.choice([[], [1, 2], "text", [[[1]]], {"a": 1}])
        return "POST", infer_path, {}, json.dumps({"inputs": [entry]}).encode()
    if kind == 2:
        cut = bytearray(good)
        for _ in range(draw.randrange(1, 30)):
            cut[draw.randrange(len(cut))] = draw.randrange(256)
        # Damage may leave an image that can be read: it is asked for no task, and refused.
        return "POST", "/classify?model=m", {}, bytes(cut[: draw.randrange(len(cut))])
    if kind == 3:
        return "POST", "/classify", {"Inference-Header-Content-Length": "-5"}, b"{" * 50
    if kind == 4:
        boundary = {
            "Content-Type": f"multipart/form-data; boundary={draw.choice(['x', 'y' * 200])}"
        }
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\n\r\n'
        return "POST", "/classify", boundary, body + bytes(draw.randrange(50)) + b"\r\n--x--\r\n"
    if kind == 5:
        length = {connections_header(): str(draw.choice([-1, 0, 5, 10**9, "x"]))}
        return "POST", infer_path, length, b'{"inputs": []}' + bytes(20)
    return (
        draw.choice(["GET", "PUT", "DELETE", "POST"]),
        f"/v2/models/{draw.choice(names)}",
        {},
        b"",
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_thousand_hostile_requests_change_nothing(files, images):
    process, address = spawned(files, "--seconds", "2", "--image-megapixels", "1")
    host, _, port = address.removeprefix("http://").rpartition(":")
    good, draw = images[0].read_bytes(), random.Random(1)
    big, codes = bomb(3000), set()

    def attack(requests):
        seen = set()
        with httpx.Client(base_url=address, timeout=60) as session:
            for method, path, headers, body in requests:
                try:
                    answer = session.request(method, path, headers=headers, content=body)
                except (httpx.InvalidURL, httpx.RemoteProtocolError, httpx.LocalProtocolError):
                    continue
                seen.add(answer.status_code)
                assert "Traceback" not in answer.text
                assert answer.status_code < 500 or answer.status_code == 503
        return seen

    try:
        settled = None
        for turn in range(50):
            slow_senders = [socket.create_connection((host, int(port))) for _ in range(4)]
            for sender in slow_senders:
                sender.sendall(
                    b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\na"
                )
            with ThreadPoolExecutor(4) as pool:
                parts = [
                    [hostile(draw, good) for _ in range(249)]
                    + [("POST", "/classify?model=m", {}, big)]
                    for _ in range(4)
                ]
                for seen in pool.map(attack, parts):
                    codes |= seen
            for sender in slow_senders:
                sender.close()
            right = httpx.post(f"{address}/classify?model=m&task=signs", content=good, timeout=60)
            assert right.status_code == 200
            if turn == 9:
                settled = resident_mib(process.pid)
        assert resident_mib(process.pid) < settled + 50
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert {400, 404, 405} <= codes


def test_one_broken_image_of_a_form_does_not_fail_the_others(server, images):
    good = images[0].read_bytes()
    sent = [("image", ("a.png", good)), ("file", ("b.png", b"no image")), ("x", ("c.png", good))]
    answer = post(server, files=sent)
    assert answer.status_code == 200
    first, second, third = answer.json()["predictions"]
    assert set(first) == {"file", "answer", "rejected", "classes", "mask"}
    assert second["file"] == "b.png"
    assert "'b.png'" in second["error"]
    assert first["answer"] == third["answer"]


def test_text_fields_of_a_form_are_options(server, images):
    sent = [("image", ("a.png", images[0].read_bytes()))]
    answer = post(server, files=sent, data={"top": "1", "task": "shapes", "model": "more"})
    assert len(answer.json()["predictions"][0]["classes"]) == 1
    unknown = post(server, files=sent, data={"colour": "1"})
    assert unknown.status_code == 400
    assert "unknown field 'colour'; use model, task" in unknown.json()["error"]
    assert "top is 'many'; use a number" in post(server, files=sent, data={"top": "many"}).text


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
@pytest.mark.parametrize("key", ["image", "images"])
def test_images_in_json_are_base64(server, images, form, key):
    content = [image.read_bytes() for image in images[:2]]
    texts = [form.format(base64.b64encode(each).decode()) for each in content]
    answer = post(server, json={key: texts, "top": 2})
    expected = post(server, files=[("image", ("a", each)) for each in content])
    for mine, theirs in zip(
        answer.json()["predictions"], expected.json()["predictions"], strict=True
    ):
        assert mine["answer"] == theirs["answer"]
        assert len(mine["classes"]) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"picture": "x"}, "the JSON has no field images; send image files as a form"),
        ({"image": "?"}, "an image is not base64"),
        ({"image": [7]}, "an image is 7, not base64"),
        ([1], "the JSON has no field images"),
    ],
)
def test_json_that_holds_no_images_is_told_how(server, body, message):
    answer = post(server, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_json_may_hold_nulls_numbers_and_one_broken_image(server, images):
    good = base64.b64encode(images[0].read_bytes()).decode()
    address = f"data:image/jpeg;name=a b.jpg;base64,{good}"
    asked = {"images": [good, "***", None, address], "task": None, "top": 1.0, "reject": None}
    answer = post(server, json=asked)
    assert answer.status_code == 200
    first, second, third, fourth = answer.json()["predictions"]
    assert first["classes"] == fourth["classes"]
    assert len(first["classes"]) == 1
    assert "not base64" in second["error"]
    assert "null, not base64" in third["error"]


def test_a_form_that_is_cut_off_is_told_so(server, images):
    request = httpx.Request("POST", server.address, files={"image": images[0].read_bytes()})
    headers = {"Content-Type": request.headers["content-type"]}
    answer = post(server, content=request.read()[:160], headers=headers)
    assert answer.status_code == 400
    assert "the form contains no file or is truncated" in answer.json()["error"]


def test_head_is_answered_without_a_body(server):
    for path in ("/v2/health/live", "/metrics", "/v2"):
        answer = httpx.head(server.address + path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert "adavipro_threads 2" in httpx.get(server.address + "/metrics").text.replace(".0", "")


def test_pages_of_allowed_origins_may_ask(files, images):
    page, other = "https://example.org", "https://evil.example"
    checkpoint = files / "shapes" / "checkpoint.safetensors"
    token = files / "token"
    token.write_text("a" * 20)
    with running(checkpoint, allow_origin=(page,), token_file=token) as server:
        asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization"
        flight = httpx.options(server.address + "/classify", headers=asked)
        assert flight.status_code == 200
        assert flight.headers["access-control-allow-origin"] == page
        refused = httpx.options(server.address + "/classify", headers=asked | {"Origin": other})
        assert "access-control-allow-origin" not in refused.headers
        headers = {"Origin": page, "Authorization": "Bearer " + "a" * 20}
        answer = post(server, content=images[0].read_bytes(), headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        assert post(server, content=b"", headers={"Origin": page}).status_code == 401
    with pytest.raises(ValueError, match="use scheme and host"):
        ServeConfig(("x",), allow_origin=("example.org/page",))
