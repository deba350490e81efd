"""Graders: OpenAI's JSON and what stands beside it, what cannot be judged, and what is refused in one line."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.objectives.graders import (
    Outside,
    asking,
    case_of,
    check_items,
    grade,
    read_graders,
    rewards_of,
)
from jaxft.objectives.graders.asking import KEY
from jaxft.objectives.graders.similarity import MEASURES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "similarity.json").read_text())
SAID = "{{ sample.output_text }}"
WANTED = "{{ item.answer }}"
CHECK = {"type": "string_check", "input": SAID, "reference": WANTED, "operation": "eq"}
ALIKE = {
    "type": "text_similarity",
    "input": SAID,
    "reference": WANTED,
    "evaluation_metric": "rouge_l",
}


def said(grader, text="", item=None, outside=None):
    """What one grader says of one answer."""
    item = {"answer": "Paris"} if item is None else item
    [[verdict]] = grade(read_graders([grader]), [case_of(item, text)], outside or Outside())
    return verdict


def reward(*arguments):
    verdict = said(*arguments)
    assert verdict.reason == ""
    return verdict.reward


@pytest.mark.parametrize(
    ("operation", "text", "want"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("ne", "Rome", 1), ("ne", "Paris", 0),
        ("like", "It is Paris.", 1), ("like", "it is paris", 0), ("ilike", "it is PARIS", 1), ("ilike", "Rome", 0),
    ],
)  # fmt: skip
def test_string_check(operation, text, want):
    assert reward(CHECK | {"operation": operation}, text) == want


@pytest.mark.parametrize("name", GOLDEN)
def test_measures_are_nltks_and_rapidfuzzs(name):
    for text, reference, want in GOLDEN[name]:
        assert MEASURES[name](text, reference) == pytest.approx(want)


@pytest.mark.parametrize(
    ("metric", "want"),
    [("rouge_1", 2 / 3), ("rouge_2", 2 / 7), ("rouge_l", 2 / 3), ("rouge_5", 0)],
)
def test_rouge_is_f1(metric, want):
    item = {"answer": "police killed the gunman"}
    found = reward(ALIKE | {"evaluation_metric": metric}, "Police kill the gunman, today.", item)
    assert found == pytest.approx(want)


def test_what_would_take_minutes_is_not_compared():
    verdict = said(ALIKE | {"evaluation_metric": "fuzzy_match"}, "a" * 10**6, {"answer": "b" * 10**6})  # fmt: skip
    assert verdict == (None, "texts of 1,000,000 and 1,000,000 elements are too long to be compared")  # fmt: skip


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    item = {"answer": "the cat sat on the mat"}
    assert reward(ALIKE | {"evaluation_metric": "bleu"}, item["answer"], item) == pytest.approx(1)


def test_cosine_asks_for_embeddings():
    table = {"a": [1.0, 0.0], "b": [1.0, 1.0]}
    outside = Outside(embed=lambda texts: np.asarray([table[text] for text in texts]))
    grader = ALIKE | {"evaluation_metric": "cosine"}
    assert reward(grader, "a", {"answer": "b"}, outside) == pytest.approx(0.5**0.5)
    with pytest.raises(UserError, match="cosine compares embeddings"):
        said(grader, "a", {"answer": "b"})


def test_python_is_given_the_sample_and_the_item():
    source = "def grade(sample, item):\n    return sample['output_json']['n'] * item['factor']"
    assert reward({"type": "python", "source": source}, '{"n": 3}', {"factor": 0.5}) == 1.5
    verdict = said({"type": "python", "source": source}, "no JSON", {"factor": 0.5})
    assert verdict.reward is None
    assert verdict.reason.startswith("TypeError: ")


def test_python_may_hold_what_a_module_may():
    source = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert reward({"type": "python", "source": source + "def grade(sample, item): return A(3).x"}) == 3  # fmt: skip


def test_a_reward_without_a_deviation_is_none():
    """Its square would be no float32, and the advantages of its whole group nothing."""
    source = "def grade(sample, item): return item['n']"
    python = {"type": "python", "source": source}
    assert said(python, "", {"n": 1e300}) == (None, "the reward 1e+300 is larger than 1e+18")
    assert said(several("10 ^ 20 + a", a=CHECK)[0]).reward is None
    assert reward(python, "", {"n": -1e18}) == -1e18


def test_a_formula_of_several():
    grader = {
        "type": "multi",
        "graders": {"right": CHECK, "alike": ALIKE},
        "calculate_output": "0.5 * right + 2 ^ alike - max(right, abs(-alike)) / 4",
    }
    assert reward(grader, "Paris") == pytest.approx(0.5 + 2 - 0.25)
    assert reward(grader, "Rome") == pytest.approx(1)
    assert (
        reward({**grader, "graders": CHECK | {"name": "one"}, "calculate_output": "one"}, "Paris")
        == 1
    )
    [grader] = several("(a\n + 2)\n * min(a)", a=CHECK)
    assert reward(grader, "Paris") == 3


def test_of_what_a_formula_does_not_use_nothing_is_needed():
    graders = {"right": CHECK, "lost": CHECK | {"reference": "{{ item.nothing }}"}}
    assert reward({"type": "multi", "graders": graders, "calculate_output": "right"}, "Paris") == 1
    verdict = said({"type": "multi", "graders": graders, "calculate_output": "right + lost"})
    assert verdict == (None, "lost: the item has no nothing")
    verdict = said({"type": "multi", "graders": graders, "calculate_output": "1 / right"}, "Rome")
    assert verdict == (None, "the formula has no value: float division by zero")
    verdict = said({"type": "multi", "graders": graders, "calculate_output": "9^9^9^9 * right"})
    assert verdict.reason.startswith("the formula has no value: ")


def test_math_reads_values():
    pytest.importorskip("math_verify")
    graders = read_graders([{"type": "math", "reference": WANTED}])
    texts = ["so $\\frac{1}{2}$", "0.5", "it is 2", "no idea"]
    [found] = grade(graders, [case_of({"answer": "1/2"}, text) for text in texts])
    assert [one.reward for one in found] == [1, 1, 0, 0]


def test_json_schema_looks_at_the_answer():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    graders = read_graders([{"type": "json_schema", "schema": schema}])
    texts = ['{"a": 1}', '{"a": "1"}', "{", "[]", '{"a": 1, "b": NaN}', "[" * 5000]
    [found] = grade(graders, [case_of({}, text) for text in texts])
    assert [one.reward for one in found] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "objekt"}}}, "schema: properties.a.type: 'objekt' is not valid"),
        ({"$ref": "http://127.0.0.1:9/x"}, "it refers to 'http://127.0.0.1:9/x', which it does not hold: nothing is"),
        ({"$ref": "#"}, "schema: it recurses too deeply"),
        ({"name": "x", "schema": {}}, "none of its keys is JSON Schema's, so it allows everything: name, schema"),
    ],
)  # fmt: skip
def test_a_schema_that_can_judge_nothing_is_refused(schema, message):
    pytest.importorskip("jsonschema")
    with pytest.raises(UserError, match=r"^config\.graders: grader 1: ") as error:
        read_graders([{"type": "json_schema", "schema": schema}])
    assert message in str(error.value)


def test_a_pattern_is_found_or_finds_the_reference():
    assert reward({"type": "regex", "pattern": "#### *[0-9]+$"}, "so #### 12") == 1
    answer = {"type": "regex", "pattern": "#### *([0-9]+)", "reference": WANTED}
    assert reward(answer, "#### 12", {"answer": 12}) == 1
    assert reward(answer, "#### 13", {"answer": 12}) == 0


def test_places_reach_into_items_and_answers():
    item = {"parts": [{"x": "a"}], "n": 1.5, "kind of": "b"}
    reference = "{{item.parts[0].x}}{{ item.n }}{{ item['kind of'] }}"
    grader = CHECK | {"reference": reference, "input": "{{ sample.output_json.said[-1] }}"}
    assert reward(grader, '{"said": ["", "a1.5b"]}', item) == 1
    assert reward(grader, "no JSON", item) == 0  # the answer's fault
    assert said(grader, "", {"parts": []}) == (None, "the item has no parts.0.x")


class Server(http.server.BaseHTTPRequestHandler):
    """A chat model that judges by what it is asked; the second request is answered at the second try."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        text = body["messages"][-1]["content"]
        busy = "busy" in text and sum("busy" in str(asked[1]) for asked in self.server.asked) == 1
        answer = '{"result": 0.75}' if "Paris" in text else "I cannot say"
        reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.asked = []
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


JUDGE = {
    "type": "score_model",
    "model": "judge",
    "input": [{"role": "user", "content": f"Is {SAID} like {WANTED}?"}],
    "sampling_params": {"temperature": 0, "max_completions_tokens": 20},
}


def test_a_model_judges_at_its_url(server, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    graders = read_graders([JUDGE | {"url": url}])
    cases = [case_of({"answer": "Paris"}, "busy"), case_of({"answer": "Rome"}, "Rome")]
    [[first, second]] = grade(graders, cases)
    assert first == (0.75, "")
    assert second == (None, "the model's answer holds no result: 'I cannot say'")
    path, body, key = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 20)
    assert body["messages"][0]["content"].endswith('{"result": NUMBER}, a number from 0 to 1.')
    assert key == "Bearer secret"


def test_a_server_that_is_not_there_judges_nothing(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    verdict = said(JUDGE | {"url": "http://127.0.0.1:1/v1"}, "Paris")
    assert verdict.reward is None
    assert "refused" in verdict.reason


def test_a_model_of_ones_own_judges_too():
    def ask(model, talks, sampling):
        assert (model, sampling["temperature"]) == ("judge", 0)
        return ["Well.\nScore: 1" if "Paris" in str(talk) else '{"result": 7}' for talk in talks]

    assert reward(JUDGE, "Paris", {"answer": "x"}, Outside(ask=ask)) == 1
    verdict = said(JUDGE, "Rome", {"answer": "x"}, Outside(ask=ask))
    assert verdict == (None, "the model's result 7 lies outside of 0 to 1")
    with pytest.raises(UserError, match="give url"):
        said(JUDGE, "Rome", {"answer": "x"})


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ('{"result": 5e-1}', 0.5), ('{"score": "-.5"}', -0.5), ('{"result": 7/10}', None), ('{"result": 1e400}', None),
        ("-1", -1), ("Score: -1", -1), (".5", 0.5), ("- **Score: 1.**", 1), ("8/10", None), ("0,5", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer_is_read_whole(answer, want):
    assert asking.score(answer, (-1, 1))[0] == want


@pytest.mark.parametrize("slow", ["says nothing", "says a word at a time"])
def test_a_server_that_hangs_is_given_up(slow, server, monkeypatch):
    """After as many requests as are made at once: each of the others would wait as long."""

    def do_POST(self):
        self.server.asked.append(self.path)
        if slow == "says nothing":
            ended.wait(5)
            return
        self.send_response(200)
        self.end_headers()
        while not ended.wait(0.03):
            self.wfile.write(b" ")

    ended = threading.Event()
    monkeypatch.setattr(Server, "do_POST", do_POST)
    monkeypatch.setattr(asking, "WAITING", 0.1)
    monkeypatch.setattr(asking, "TOGETHER", 2)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    [found] = grade(read_graders([JUDGE | {"url": url}]), [case_of({"answer": "x"}, "x")] * 9)
    ended.set()
    assert {one.reason for one in found} == {"the model does not answer: no answer within 0.1 s"}
    assert len(server.asked) == 2


def test_rewards_go_into_advantages():
    graders = read_graders([CHECK, ALIKE | {"weight": 0.5}])
    cases = [case_of({"answer": "a"}, "a"), case_of({"answer": "a"}, "b"), case_of({}, "a")]
    rewards = rewards_of(grade(graders, cases))
    np.testing.assert_array_equal(rewards, [[1, 1], [0, 0], [np.nan, np.nan]])
    weights = [grader.weight for grader in graders]
    found = jaxft.advantages(rewards, 3, weights=weights, scale="none")
    np.testing.assert_allclose(found, [0.75, -0.75, 0])


def test_a_file_holds_a_list_or_one_or_an_object_of_them(tmp_path):
    file = tmp_path / "graders.json"
    for whole in ([CHECK], CHECK, {"graders": [CHECK]}):
        file.write_text(json.dumps(whole))
        [found] = read_graders(str(file))
        assert (found.kind, found.name, found.weight) == ("string_check", "string_check", 1.0)


def test_fields_of_items_are_looked_at_before_a_run():
    inner = {"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a"}
    graders = read_graders([inner])
    check_items(graders, {"rows.jsonl:1": {"answer": "x"}})
    message = r"rows.jsonl:2: the row has no 'answer', which grader 'multi' asks for \(nearest: 'answers'\)"
    with pytest.raises(UserError, match=message):
        check_items(graders, {"rows.jsonl:2": {"answers": "x"}})


def less(grader, *names):
    return {name: value for name, value in grader.items() if name not in names}


def several(formula, **graders):
    return [{"type": "multi", "graders": graders, "calculate_output": formula}]


REFUSED = {
    "no list": (3, "a list of graders is expected"),
    "none": ([], "of at least one"),
    "no object": (["x"], "grader 1: an object is expected, not 'x'"),
    "no type": ([{"typ": "regex"}], "grader 1: type is missing: keys found are 'typ'"),
    "type": ([CHECK | {"type": "string_chek"}], "grader 1: unknown type of grader 'string_chek'"),
    "type's nearest": ([CHECK | {"type": "string_chek"}], "(nearest: 'string_check'"),
    "field": (
        [CHECK | {"name": "x", "operatoin": "eq"}], "grader 1 ('x'): unknown field 'operatoin' (nearest: 'operation'",
    ),
    "missing": ([less(CHECK, "operation")], "grader 1: operation is missing"),
    "kind": ([CHECK | {"input": 3}], "grader 1: input: a text is expected, not 3"),
    "choice": ([CHECK | {"operation": "equal"}], "grader 1: unknown operation 'equal': known are eq, ne, like, ilike"),
    "place": ([CHECK | {"input": "{{ item }}"}], "'{{ item }}' is no placeholder"),
    "root": ([CHECK | {"input": "{{ row.x }}"}], "'{{ row.x }}' is no placeholder"),
    "sample": ([CHECK | {"input": "{{ sample.output }}"}], "a sample has no 'output' (nearest: 'output_text'"),
    "twice": ([CHECK, CHECK], "two graders are called 'string_check'"),
    "syntax": ([{"type": "python", "source": "def grade(s, i) return 1"}], "grader 1: source: SyntaxError: line 1"),
    "no grade": ([{"type": "python", "source": "x = 1"}], "source: it defines no grade(sample, item)"),
    "pattern": ([{"type": "regex", "pattern": "("}], "grader 1: pattern: "),
    "formula": (several("a +", a=CHECK), "'a +' is no formula"),
    "formula's name": (several("rigt", right=CHECK), "names 'rigt', which is no grader of it (nearest: 'right'"),
    "formula's call": (several("open(a)", a=CHECK), "the formula calls 'open'"),
    "formula's attribute": (several("a.b", a=CHECK), "the formula holds 'a.b'"),
    "part": (several("a", a=less(CHECK, "input")), "grader 1: grader 1 ('a'): input is missing"),
    "messages": ([JUDGE | {"input": [{"content": "x"}]}], "input[0] is no message"),
    "range": ([JUDGE | {"range": [1, 0]}], "range [1, 0] holds no numbers"),
    "url": ([JUDGE | {"url": "ftp://x"}], "does not begin with http"),
    "url's host": ([JUDGE | {"url": "http://[::1/v1"}], "url 'http://[::1/v1': Invalid IPv6 URL"),
    "url's key": ([JUDGE | {"url": "http://me:key@x/v1"}], "a key is given in JAXFT_JUDGE_KEY"),
    "sampling": ([JUDGE | {"sampling_params": {"top_p": "x"}}], "sampling_params.top_p: a number is expected, not 'x'"),
    "formula's values": (several("abs(a, a)", a=CHECK), "the formula gives abs 2 values: it takes one"),
    "part's name": (several("1", **{"if": CHECK}), "'if' cannot stand in a formula"),
    "name": ([CHECK | {"name": "a\nb"}], r"name 'a\nb': it stands in one line"),
    "weight": ([CHECK | {"weight": float("nan")}], "weight: a number that is no larger than 1e+18 is expected"),
    "large weight": ([CHECK | {"weight": 10**400}], "weight: a number that is no larger than 1e+18 is expected"),
    "large range": ([JUDGE | {"range": [0, 10**400]}], "two numbers are expected"),
    "nested": ([functools.reduce(lambda a, _: several("a", a=a)[0], range(500), CHECK)], "nested too deeply"),
    "function": ([{"type": "function", "function": "nowhere_at_all:f"}], "no module 'nowhere_at_all'"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_grader_is_refused_in_one_line(source, message):
    with pytest.raises(UserError) as error:
        read_graders(source)
    assert message in str(error.value)
    assert str(error.value).startswith("config.graders: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "package"), [("math", "math_verify"), ("json_schema", "jsonschema")])  # fmt: skip
def test_a_package_that_is_absent_is_named_with_the_extra(kind, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    grader = {"math": {"reference": "1"}, "json_schema": {"schema": {}}}[kind] | {"type": kind}
    with pytest.raises(UserError, match=rf"package {package} .* pip install 'jaxft\[graders\]'"):
        read_graders([grader])


def test_a_file_that_is_no_json_is_named_with_the_line(tmp_path):
    file = tmp_path / "graders.json"
    file.write_text('[{"type": "regex",\n}]')
    with pytest.raises(UserError, match=r"graders\.json: not JSON: .*line 2"):
        read_graders(file)
    with pytest.raises(UserError, match=r"nothing\.json"):
        read_graders(tmp_path / "nothing.json")
