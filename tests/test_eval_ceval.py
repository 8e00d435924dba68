"""Exams: reading, prompts to the letter, grading against models that know and that do not, the program itself."""

import csv
import importlib
import json
import math
import os
import socket
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.errors import UserError
from exams import exam, exam_report, harness
from exams.contamination import Contamination, strings
from exams.exam import LETTERS, Question
from exams.published import arrange
from export.transformers_folder import write_transformers_folder
from inference import open_model
from inference.engine import Engine
from inspection.exam_results import find_exams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_text, load_tokenizer
from model.weights import save_weights

eval_ceval = importlib.import_module("eval_ceval")
ROOT = Path(__file__).parent.parent
SIGNS = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉"  # each question of the little exam holds one of them


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def little_exam(tmp_path):
    """Two subjects of ten questions; the right letters go round."""
    for split, signs in (("val", SIGNS), ("dev", "天地玄黄宇宙洪荒日月")):
        (tmp_path / split).mkdir()
        for s, subject in enumerate(("college_physics", "college_chemistry")):
            with open(tmp_path / split / f"{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "question", *LETTERS, "answer", "explanation"])
                for i, sign in enumerate(signs[s::2]):
                    options = [f"选项{i}{letter}" for letter in LETTERS]
                    writer.writerow([i, f"{sign}是什么？", *options, LETTERS[i % 4], ""])
    return tmp_path


@pytest.fixture(scope="module")
def engine(tokenizer):
    torch.manual_seed(0)
    config = LMConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_seq_len=512, initializer_range=0.2)
    return Engine(MiniMindForCausalLM(config).eval(), tokenizer)


class Rigged(torch.nn.Module):
    """Looks for a question's sign among the tokens it is given and puts all weight on one letter, right or wrong."""

    def __init__(self, tokenizer, knows: bool):
        super().__init__()
        self.config = LMConfig(dim=16, n_layers=1, n_heads=1, n_kv_heads=1)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")
        self.key = {}
        for place, sign in enumerate(SIGNS):
            right = place // 2 % 4
            letter = LETTERS[right if knows else (right + 1) % 4]
            self.key[tuple(encode_text(tokenizer, sign))] = [
                encode_text(tokenizer, letter)[0], encode_text(tokenizer, " " + letter)[0],
            ]  # fmt: skip

    def forward(self, input_ids, logits_to_keep, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for sign, letters in self.key.items():
                if any(tuple(ids[i : i + len(sign)]) == sign for i in range(len(ids))):
                    row[:, letters] = 10.0
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


# ---------------------------------------------------------------------------------------------------------- grading
@pytest.mark.parametrize("form", ["chat", "completion"])
@pytest.mark.parametrize(("knows", "accuracy"), [(True, 1.0), (False, 0.0)])
def test_a_model_that_knows_and_one_that_never_does(form, knows, accuracy, little_exam, tokenizer):
    engine = Engine(Rigged(tokenizer, knows), tokenizer)
    ask = exam.AskByChat(engine) if form == "chat" else exam.AskByCompletion(engine, "ceval", shots=3)
    graded = exam.take_exam(engine, exam.read_exam(little_exam, "ceval"), ask)
    summary = exam_report.summarise(graded.answers)
    assert (summary["accuracy_micro"], summary["accuracy_macro"], summary["n"]) == (accuracy, accuracy, 20)
    assert all(max(a.probabilities) > 0.99 for answers in graded.answers.values() for a in answers)


def test_text_scores_each_options_words_as_the_reply(engine, little_exam, tokenizer):
    """The total log-probability of the option's tokens after the question alone, its closing gap left out."""
    question = exam.Question("天空的颜色是____", ("蓝", "红色", "很绿", "黄"), "A")
    prompt, options, dropped = exam.AskByText(engine)(None, question)
    assert tokenizer.decode(prompt).count("____") == 0 and "红色" not in tokenizer.decode(prompt) and dropped == 0
    assert prompt == engine.encode([{"role": "user", "content": "天空的颜色是"}])
    subject = exam.Subject("colours", "colours", None, [question], [])
    (answer,) = exam.take_exam(engine, [subject], exam.AskByText(engine)).answers["colours"]
    logits = [engine.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for ids in options]
    totals = [
        sum(rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
        for rows, ids in zip(logits, options, strict=True)
    ]
    assert answer.probabilities == pytest.approx(torch.tensor(totals).softmax(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("shots", [0, 5])
def test_batches_and_shared_prefixes_give_the_answers_of_one_at_a_time(shots, little_exam, engine, tokenizer):
    subjects = exam.read_exam(little_exam, "ceval")
    ask = exam.AskByCompletion(engine, "ceval", shots)
    graded = exam.take_exam(engine, subjects, ask)
    for subject in subjects:
        for question, answer in zip(subject.questions, graded.answers[subject.name], strict=True):
            prompt, letters, _ = ask(subject, question)
            with torch.no_grad():
                log_p = engine.source(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            alone = exam.answer_of(question, [log_p[letter[0]].item() for letter in letters])
            assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
            assert (
                answer.chosen == alone.chosen
                or sorted(alone.probabilities)[-1] - sorted(alone.probabilities)[-2] < 1e-4
            )


def test_shots_are_dropped_until_the_prompt_fits(little_exam, engine):
    subjects = exam.read_exam(little_exam, "ceval")
    ask = exam.AskByCompletion(engine, "ceval", shots=5)
    full = [len(ask(s, q)[0]) for s in subjects for q in s.questions]
    context, engine.context = engine.context, min(full) - 20
    try:
        asked = [ask(s, q) for s in subjects for q in s.questions]
        assert all(len(prompt) + 1 <= engine.context and dropped >= 1 for prompt, _, dropped in asked)
        assert exam.take_exam(engine, subjects, ask).shots_dropped == sum(dropped for *_, dropped in asked)
        engine.context = 20  # not even the question fits: its end is kept, and counted
        assert exam.take_exam(engine, subjects, ask).prompts_cut == 20
    finally:
        engine.context = context


# ---------------------------------------------------------------------------------------------------------- prompts
def test_chat_prompt_is_minimind_v1s(engine):
    question = Question("1+1=?", ("1", "2", "3", "4"), "B")
    prompt, letters, _ = exam.AskByChat(engine)(None, question)
    assert engine.tokenizer.decode(prompt) == (
        "<|im_start|>system\n开始回答问题<|im_end|>\n"
        "<|im_start|>user\n1+1=?。选择 A: 1, B: 2, C: 3, D: 4<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [engine.tokenizer.decode(x) for x in letters] == list("ABCD") and all(len(x) == 1 for x in letters)
    plain, *_ = exam.AskByChat(engine, system="")(None, question)
    assert engine.tokenizer.decode(plain).startswith("<|im_start|>user\n1+1=?。选择")


def test_completion_prompt_is_the_harness_s():
    shot, asked = Question(" 一？ ", ("a", "b", "c ", "d"), "C"), Question("二？", ("e", "f", "g", "h"), "A")
    assert exam.completion_prompt("ceval", "法学", [shot], asked) == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        "一？\nA. a\nB. b\nC. c \nD. d\n答案： C\n\n二？\nA. e\nB. f\nC. g\nD. h\n答案："
    )
    assert exam.completion_prompt("tmmluplus", "會計學", [], asked) == (
        "以下為會計學的單選題，請提供正確答案的選項。\n\n二？\nA. e\nB. f\nC. g\nD. h\nAnswer:"
    )
    assert exam.completion_prompt("openbookqa", "", [shot], asked) == " 一？  c \n\n二？"


def test_context_and_choice_are_encoded_together(tokenizer):
    prompt, choices = exam.split_pair(tokenizer, "the answer is  ", [" A", " B"])
    assert tokenizer.decode(prompt) == "the answer is"
    assert [tokenizer.decode(prompt + choice) for choice in choices] == ["the answer is   A", "the answer is   B"]


# ------------------------------------------------------------------------------------------------------- statistics
def test_intervals_against_published_values():
    low, high = exam_report.wilson(81, 263)  # Newcombe 1998 (Statistics in Medicine 17), table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert exam_report.wilson(0, 20)[0] == 0.0 and exam_report.wilson(20, 20)[1] == 1.0
    low, high = exam_report.macro_interval([(50, 96), (50, 96)])  # p = 0.52 of 100, twice
    half = 1.959964 * math.sqrt(2 * 0.52 * 0.48 / 100) / 2
    assert high - low == pytest.approx(2 * half)


def test_summary_by_hand():
    def answers(pairs):
        return [
            exam.answer_of(Question("", ("",) * 4, gold), [float(x == said) for x in LETTERS]) for gold, said in pairs
        ]

    summary = exam_report.summarise({"x": answers([("A", "A"), ("A", "B"), ("B", "B")]), "y": answers([("D", "A")])})
    assert summary["accuracy_micro"] == 0.5 and summary["accuracy_macro"] == pytest.approx(1 / 3)
    assert summary["letters"] == {"A": 2, "B": 2, "C": 0, "D": 0} and summary["majority_letter_accuracy"] == 0.5
    assert f"  A      2   50.0%  {'#' * 25}" in exam_report.lines([], {}, summary)


# ---------------------------------------------------------------------------------------------------- reading files
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,question,A,B,C,answer\n0,q,1,2,3,A\n", "2: no column D"),
        ("question,A,B,C,D,answer\nq,1,2,3,4,A\nq,1,2,3,4,E\n", "3: the answer is 'E', not one of A, B, C, D"),
        ("question,A,B,C,D,answer\nq,1,2,3\n", r"2: broken CSV \(4 fields for 6 columns\)"),
        ("question,A,B,C,D,answer\n", "has no questions"),
        ("question,A,B,C,D,answer\nq 1, 2,b,c,d,A,A\n", r"2: broken CSV \(7 fields for 6 columns\)"),
        ('question,A,B,C,D,answer,why\nq,1,2,3,4,A,"so\nq,1,2,3,4,B,x\n', "2: broken CSV"),
        (b"question,A,B,C,D,answer\n\xff\xfe,1,2,3,4,A\n", "not UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(content, message, tmp_path):
    file = tmp_path / "val" / "law_val.csv"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"law_val\.csv.*" + message):
        exam.read_exam(tmp_path, "ceval")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "a row must be a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a question of OpenBookQA"),
        ('{"question_stem": "s", "choices": {"label": ["A","B","C","D"], "text": [1, 2, 3, 4]}, "answerKey": "A"}',
         "must be texts"),
        ('{"question_stem": "s", "choices": {"label": ["A","B","C","D"], "text": ["1","2","3","4"]}, "answerKey": 1}',
         "must be texts"),
    ],
)  # fmt: skip
def test_bad_json_lines_are_named(line, message, tmp_path):
    (tmp_path / "test.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.jsonl:1: .*" + message):
        exam.read_questions(tmp_path / "test.jsonl")


def test_other_layouts(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "对联.csv").write_text("Question,A,B,C,D,Answer\n上联？,一,二,三,四,B\n", encoding="utf-8")
    (subject,) = exam.read_exam(tmp_path, "aclue")
    assert (subject.name, subject.title, subject.questions[0].answer) == ("对联", "对联", "B")
    labels, texts = list(LETTERS), ["w", "x", "y", "z"]
    choices = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    rows = [
        {"question": {"stem": "s", "choices": choices}, "answerKey": "C"},
        {"question_stem": "s", "choices": {"label": labels, "text": texts}, "answerKey": "C"},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = exam.read_questions(tmp_path / "test.jsonl")
    assert first == second == Question("s", ("w", "x", "y", "z"), "C")


def test_ceval_is_read_whole():
    folder = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data")) / "benchmarks" / "ceval"
    if not folder.is_dir():
        pytest.skip("C-Eval is not here; $DATA names the folder of real data")
    subjects = exam.read_exam(folder, "ceval")
    assert (len(subjects), sum(len(s.questions) for s in subjects)) == (52, 1346)
    assert all(len(s.shots) == 5 and s.group for s in subjects)


def write_csv(path, columns, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def publish(name, folder, subject):
    """Three questions as the publishers of a benchmark lay them out, archives and Parquet included."""
    import pyarrow
    from pyarrow import parquet

    row = ["二加二？", "一", "二", "三", "四", "D"]
    lower, upper = (["question", *LETTERS, "answer"], ["Question", *LETTERS, "Answer"])
    if name == "ceval":  # on the Hugging Face hub: a folder a subject, Parquet
        for split in ("dev", "val"):
            table = pyarrow.Table.from_pylist(
                [dict(zip(["id", *lower, "explanation"], [0, *row, ""], strict=True))] * 3
            )
            (folder / subject).mkdir(exist_ok=True)
            parquet.write_table(table, folder / subject / f"{split}-00000-of-00001.parquet")
    elif name in ("cmmlu", "aclue"):  # an archive of <split>/<subject>.csv, an index column in front
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for split in ("dev", "test"):
                lines = [["", *upper], *([i, *row] for i in range(3))]
                archive.writestr(f"{split}/{subject}.csv", "\n".join(",".join(map(str, line)) for line in lines))
    elif name == "tmmluplus":  # data/<subject>_<split>.csv
        for split in ("train", "test", "dev", "val"):
            write_csv(folder / "data" / f"{subject}_{split}.csv", lower, row, row, row)
    else:  # main/<split>.parquet, the options as two lists
        (folder / "main").mkdir()
        choices = {"text": row[1:5], "label": list(LETTERS)}
        table = pyarrow.Table.from_pylist(
            [{"id": "7", "question_stem": row[0], "choices": choices, "answerKey": "D"}] * 3
        )
        for split in ("train", "test", "validation"):
            parquet.write_table(table, folder / "main" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("name", "file", "title", "group"),
    [
        ("ceval", "law", "法学", "Humanities"),
        ("cmmlu", "agronomy", "农学", None),
        ("aclue", "ancient_medical", "医古文", None),
        ("tmmluplus", "accounting", "會計學", "other"),
        ("openbookqa", "openbookqa", "openbookqa", None),
    ],
)
def test_every_benchmark_is_read_as_it_is_published_and_asked(
    name, file, title, group, tmp_path, monkeypatch, tokenizer
):
    folder = tmp_path / "dataset" / "exams" / name  # where scripts/download_data.py puts it
    folder.mkdir(parents=True)
    publish(name, folder, file)
    arrange(folder)
    monkeypatch.chdir(tmp_path)
    found = eval_ceval.find_data(eval_ceval.parse(["--benchmark", name]))
    (subject,) = exam.read_exam(found, name)
    assert found.resolve() == folder and (subject.name, subject.title) == (file, title)
    assert subject.questions == subject.shots == [Question("二加二？", ("一", "二", "三", "四"), "D")] * 3
    engine = Engine(Rigged(tokenizer, True), tokenizer)
    prompt, choices, _ = exam.AskByCompletion(engine, name, shots=1)(subject, subject.questions[0])
    text = tokenizer.decode(prompt)
    assert text.count("二加二？") == 2 and len(choices) == 4
    assert text.startswith(exam.BENCHMARKS[name].instruction.format(title)) and subject.group == group


# ------------------------------------------------------------------------------------------------------ contamination
LONG = (
    "一个装满水的容器在匀速上升的电梯里，容器底部所受的压力"
    "与电梯静止的时候相比会发生怎样的变化，请说明理由并且选出正确的一项"
)


@pytest.fixture
def overlap():
    questions = [
        Question("黄鹤楼位于哪一座城市____？", ("武汉", "南昌", "岳阳", "长沙"), "A"),
        Question("下列说法正确的是____。", ("水是单质", "氧气是单质", "盐是单质", "糖是单质"), "B"),
        Question("下列说法正确的是____。", ("鲸是鱼类", "蛙是鱼类", "鲤是鱼类", "蛇是鱼类"), "C"),
        Question(LONG, ("变大", "变小", "不变", "不定"), "C"),
        Question("1+1", ("1", "2", "3", "4"), "B"),
    ]
    return Contamination([exam.Subject("x", "x", None, questions, [])])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("问：黄鹤楼，位于\n哪一座城市？ 答：武汉。", [(0, "question")]),  # blanks, signs and line ends hide nothing
        ("黄鹤楼位于哪一座 城市", [(0, "question")]),
        ("黄鹤楼位于哪座城市？在武汉。", []),  # another wording is another text
        ("下列说法正确的是（ ）", []),  # two questions begin so: it is known by its options
        ("下列说法正确的是：Ａ鲸是鱼类", []),
        ("下列说法正确的是：鲸是鱼类，蛙是鱼类；鲤是鱼类、蛇是鱼类", [(2, "question")]),
        (f"前言。{LONG[2:]}后记。", [(3, "run")]),
        (LONG[:40], []),
        (LONG, [(3, "question")]),
        (LONG + "黄鹤楼位于哪一座城市", [(0, "question"), (3, "question")]),
        ("1+1=2", []),
        ("", []),
    ],
)
def test_overlap_by_hand(overlap, text, found):
    assert sorted((needle.number, needle.rule) for needle in overlap.find(text)) == found
    assert overlap.hidden == 1


def test_texts_of_a_row_of_any_schema():
    row = {"conversations": [{"role": "user", "content": "a"}, {"content": "b", "n": 1}], "text": "c", "x": [None, "d"]}
    assert list(strings(row)) == ["user", "a", "b", "c", "d"]
    deep = []
    for _ in range(5000):
        deep = [deep, "x"]
    assert len(list(strings(deep))) == 5000


# ------------------------------------------------------------------------------------------------------- the program
@pytest.fixture
def weights(tmp_path, tokenizer):
    config = LMConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_seq_len=512)
    save_weights(
        tmp_path / "full_sft_32.pth", MiniMindForCausalLM(config), tokenizer, {"stage": "full_sft", "seq_len": 128}
    )
    return str(tmp_path / "full_sft_32.pth")


def test_program_writes_answers_summary_and_json(weights, little_exam, tmp_path, capsys):
    out = tmp_path / "result"
    eval_ceval.main(["--weight", weights, "--data_dir", str(little_exam), "--format", "completion", "--shots", "2",
                     "--out_dir", str(out)])  # fmt: skip
    printed = capsys.readouterr().out.strip().splitlines()
    result = json.loads(printed[-1])
    assert result["n"] == 20 and sum(result["letters"].values()) == 20 and result["shots_dropped"] == 0
    assert result["interval"][0] <= result["accuracy_micro"] <= result["interval"][1]
    assert any(line.startswith("group STEM") for line in printed)
    with open(out / "college_physics_val_result.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert all((row["answer"] == row["llm_answer"]) == (row["is_right"] == "True") for row in rows)
    assert json.loads((out / "summary.json").read_text("utf-8")) == result and (out / "accuracy.png").stat().st_size > 0
    (kept,) = find_exams([tmp_path])
    assert (kept.accuracy, kept.n, kept.weights) == (result["accuracy_micro"], 20, result["weights"])


def test_bare_command_takes_the_sample_exam(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(ROOT / "dataset")
    (tmp_path / "out").mkdir()
    Path(weights).rename(tmp_path / "out" / "full_sft_32.pth")
    eval_ceval.main([])
    captured = capsys.readouterr()
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert result["data_dir"] == "dataset/sample/exam" and result["n"] == 308 and "SAMPLE" in captured.err


def test_program_names_planted_rows_and_clears_a_clean_file(weights, little_exam, tmp_path, capsys):
    planted, clean = tmp_path / "planted.jsonl", tmp_path / "clean.jsonl"
    chat = [
        {"role": "user", "content": "问题："},
        {"role": "assistant", "content": "甲 是什么？ 选项0A，选项0B，选项0C，选项0D"},
    ]
    rows = [{"text": "春天来了，花儿开了。"}, {"conversations": chat}, {"q": "x" * 99, "a": "y"}]
    planted.write_text("\n".join(map(json.dumps, rows)) + "\nno JSON\n", encoding="utf-8")
    clean.write_text(json.dumps({"text": "是什么？选项0A，选项0B，选项0C，选项0D"}) + "\n", encoding="utf-8")
    flags = ["--weight", weights, "--data_dir", str(little_exam), "--out_dir", str(tmp_path / "out"), "--contamination"]
    for files, expected in (([planted, clean], (5, 1, 1, 1)), ([clean], (1, 0, 0, 0))):
        eval_ceval.main([*flags, *map(str, files)])
        told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["contamination"]
        keys = ("rows", "rows_unreadable", "rows_overlapping", "questions_overlapping")
        assert tuple(told[key] for key in keys) == expected
        with open(tmp_path / "out" / "contamination.csv", encoding="utf-8-sig", newline="") as file:
            named = [(row["file"], row["line"], row["subject"], row["number"]) for row in csv.DictReader(file)]
        assert named == [(str(planted), "2", "college_physics", "0")] * expected[2]


@pytest.fixture
def foreign(tmp_path, tokenizer):
    """A transformers folder of a kind that has no counterpart here."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_any_transformers_model_can_be_examined(foreign, little_exam, tmp_path, capsys):
    flags = ["--weight", str(foreign), "--data_dir", str(little_exam), "--out_dir", str(tmp_path / "out")]
    eval_ceval.main([*flags, "--format", "completion", "--shots", "2"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["n"] == 20
    engine, record = open_model.open_engine(eval_ceval.parse(flags), foreign, foreign=True)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(foreign).eval(), AutoTokenizer.from_pretrained(foreign)
    prompt, choices, _ = exam.AskByCompletion(engine, "ceval", 1)(*first_question(little_exam))
    for choice, score in zip(choices, engine.score([prompt] * 4, choices), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert score.total == pytest.approx(sum(log_p[i, t].item() for i, t in enumerate(choice)), abs=1e-4)
    messages = [{"role": "user", "content": "1+1=?"}]
    assert engine.encode(messages) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        engine.encode(messages)
    (foreign / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        eval_ceval.main(flags)


def first_question(little_exam):
    subject = exam.read_exam(little_exam, "ceval")[0]
    return subject, subject.questions[0]


@pytest.mark.slow
def test_the_harness_asks_a_foreign_model_too(foreign, little_exam, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-eval.txt)")
    flags = ["--weight", str(foreign), "--data_dir", str(little_exam), "--shots", "1", "--out_dir", str(tmp_path / "o")]
    accuracy = []
    for way in ("--lm_eval",), ("--format", "completion"):
        eval_ceval.main([*flags, *way])
        accuracy.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1])["accuracy_micro"])
    assert accuracy[0] == accuracy[1]


# ----------------------------------------------------------------------------------------- lm-evaluation-harness
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ceval", "tmmluplus", "openbookqa"])
def test_harness_gives_our_log_probabilities(name, little_exam, engine, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-eval.txt)")

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_transformers_folder(tmp_path, engine.source, engine.tokenizer, {}, "little")
    subjects = exam.read_exam(little_exam, "ceval")
    given = harness.log_probabilities(tmp_path, subjects, name, shots=2)
    ask = exam.AskByCompletion(engine, name, shots=2)
    for subject in subjects:
        for question, four in zip(subject.questions, given[subject.name], strict=True):
            prompt, choices, dropped = ask(subject, question)
            ours = [score.total for score in engine.score([prompt] * 4, choices)]
            assert dropped == 0 and four == pytest.approx(ours, abs=1e-4)
    assert harness.prompts_cut(engine, subjects, name, 2) == 0
    engine.context, context = 20, engine.context
    assert harness.prompts_cut(engine, subjects, name, 2) == 20
    engine.context = context


@pytest.mark.slow
def test_program_takes_the_exam_through_the_harness(weights, little_exam, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-eval.txt)")
    results = []
    for out, flags in (("a", ["--lm_eval"]), ("b", ["--format", "completion"])):
        eval_ceval.main(["--weight", weights, "--data_dir", str(little_exam), "--shots", "3", *flags, "--out_dir",
                         str(tmp_path / out)])  # fmt: skip
        results.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    for key in ("accuracy_micro", "accuracy_macro", "letters", "n", "format", "shots"):
        assert results[0][key] == results[1][key]
    assert results[0]["lm_eval"] and results[1]["lm_eval"] is None
    tables = [(tmp_path / out / "college_chemistry_val_result.csv").read_text("utf-8-sig") for out in "ab"]
    assert tables[0].count(",True,") == tables[1].count(",True,")


def test_harness_that_is_missing_is_named(weights, little_exam, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="requirements-eval.txt"):
        eval_ceval.main(["--lm_eval", "--weight", weights, "--data_dir", str(little_exam), "--out_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lm_eval", "--format", "chat"], "--format completion"),
        (["--contamination", "nowhere.jsonl"], "no such data file: nowhere.jsonl"),
        (["--shots", "6"], "--shots must lie between 0 and 5"),
        (["--shots", "2"], "--format completion"),
        (["--format", "completion", "--system", "x"], "--format chat or text"),
        (["--lm_eval", "--format", "text"], "--format completion"),
        (["--data_dir", "nowhere"], "no folder nowhere"),
        (["--benchmark", "aclue"], "download_data.py aclue"),
        (["--split", "train"], "no questions"),
        (["--weight", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_of_the_user(arguments, message, little_exam, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [] if {"--data_dir", "--benchmark"} & set(arguments) else ["--data_dir", str(little_exam)]
    with pytest.raises(UserError, match=message):
        eval_ceval.main(arguments + data)
