"""Search: over folders in all conditions, and over the web with a stand-in for Tavily's server."""

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from recursivemas.errors import ConfigError, InputError, OutputError
from recursivemas.tools import FolderIndex, FolderSearch, TavilySearch, make_tool
from recursivemas.tools import folder_index as folder_index_module


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    notes = tmp_path / "notes"
    (notes / "deep" / "er").mkdir(parents=True)
    (notes / "trip.txt").write_text("We took the train to Vienna.\n\nThe hotel had a fine view of the river.")
    (notes / "deep" / "bread.md").write_text("# Bread\nFlour, water, salt; rest it overnight and bake it hot.")
    (notes / "deep" / "er" / "page.html").write_text(
        "<html><script>var hidden=1</script><p>Storks &amp; herons</p></html>"
    )
    return notes


def paths(index: FolderIndex, query: str) -> list[str]:
    return [passage.path for passage in index.search(query)]


def test_it_finds_passages_by_their_words(folder: Path) -> None:
    index = FolderIndex(folder)
    assert paths(index, "train to Vienna") == ["trip.txt"]
    assert paths(index, "BAKING breads") == ["deep/bread.md"]
    assert paths(index, "herons") == ["deep/er/page.html"]
    assert index.search("herons")[0].text == "Storks & herons"
    assert paths(index, "nobody wrote this_word") == []
    for query in ("", " ", "\0", "*", '"', "'; DROP TABLE passages", "a" * 10_000, "NEAR(", "train AND NOT -x:y^2"):
        index.search(query)
    assert paths(index, 'the "train" OR') == ["trip.txt"]


def test_more_and_rarer_words_rank_higher(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"common words here {'rare' if number == 7 else ''} and there")
    (tmp_path / "both.txt").write_text("rare thing, quite special")
    index = FolderIndex(tmp_path)
    assert paths(index, "common rare special")[:2] == ["both.txt", "07.txt"]
    scores = [passage.score for passage in index.search("common rare special")]
    assert scores == sorted(scores, reverse=True)


def test_bm25_is_what_its_formula_says(tmp_path: Path) -> None:
    """Against the formula, written out: k1 = 1.2, b = 0.75, and SQLite's idf, which never falls below 1e-6."""
    rng = random.Random(3)
    words = ["ash", "birch", "cedar", "elm", "fir"]
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(20)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_text(text)
    lengths = [len(text.split()) + 1 for text in texts]  # the name of the file counts as a word
    mean = sum(lengths) / len(lengths)

    def score(text: str, length: int, query: list[str]) -> float:
        from math import log

        total = 0.0
        for word in query:
            n = sum(word in other.split() for other in texts)
            idf = max(log((len(texts) - n + 0.5) / (n + 0.5)), 1e-6)
            tf = text.split().count(word)
            total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean))
        return total

    expected = {str(n): score(text, lengths[n], ["elm", "fir"]) for n, text in enumerate(texts)}
    found = {each.path: each.score for each in FolderIndex(tmp_path).search("elm fir", 20)}
    assert found.keys() == {path for path, value in expected.items() if value}
    for path, value in found.items():
        assert value == pytest.approx(expected[path], rel=1e-4, abs=1e-6)


def test_it_is_built_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    assert FolderIndex(folder).last_update.num_read == 3
    [kept] = own_cache.rglob("*.sqlite")
    again = FolderIndex(folder)
    assert again.file == kept
    assert (again.last_update.num_documents, again.last_update.num_read) == (3, 0)
    assert paths(again, "Vienna") == ["trip.txt"]


def test_what_changes_is_read_again_and_nothing_else(folder: Path) -> None:
    index = FolderIndex(folder, refresh_seconds=0.0)
    (folder / "trip.txt").write_text("We took the ferry to Corfu.")
    (folder / "new.txt").write_text("A letter about Corfu")
    (folder / "deep" / "bread.md").unlink()
    assert sorted(paths(index, "corfu")) == ["new.txt", "trip.txt"]
    assert paths(index, "vienna") == []
    assert paths(index, "flour") == []
    assert index.last_update.num_read == 3
    (folder / "trip.txt").write_text("And home again.")
    update = index.update()
    assert (update.num_documents, update.num_read, update.num_removed) == (3, 1, 0)


def test_it_looks_for_changes_now_and_then(folder: Path) -> None:
    index = FolderIndex(folder, refresh_seconds=60.0)
    (folder / "new.txt").write_text("Corfu")
    assert paths(index, "corfu") == []
    index.refresh_seconds = 0.0
    assert paths(index, "corfu") == ["new.txt"]


def test_long_texts_are_cut_into_passages_at_their_words(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(3000)]
    (tmp_path / "long.txt").write_text(" ".join(words) + "\n\n" + "x" * 5000)
    index = FolderIndex(tmp_path)
    for number in (0, 77, 1234, 2999):
        [passage] = index.search(f"word{number}")
        assert len(passage.text) <= folder_index_module.PASSAGE_CHARS
        assert set(passage.text.split()) <= {*words, *(w for w in passage.text.split() if set(w) == {"x"})}


def test_what_is_no_text_is_left_out(folder: Path) -> None:
    (folder / "picture.png").write_text("vienna")
    (folder / ".env").write_text("SECRET=vienna")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("vienna")
    (folder / "zeros.txt").write_bytes(b"vienna\0")
    (folder / "latin.txt").write_bytes("Vienna caf\xe9".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    (folder / "upper.TXT").write_text("VIENNA")
    assert sorted(paths(FolderIndex(folder), "vienna")) == ["latin.txt", "trip.txt", "upper.TXT"]


def test_links_lead_nowhere_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret of vienna")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "nothing")
    (folder / "round").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "trip.txt")
    os.mkfifo(folder / "pipe.txt")
    index = FolderIndex(folder)
    assert sorted(paths(index, "vienna")) == ["again.txt", "trip.txt"]


def test_a_folder_that_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        FolderSearch(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        FolderSearch(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no text to search .no file at all."):
        FolderSearch(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_text("x")
    with pytest.raises(InputError, match="1 hidden or of another kind.*[.]md"):
        FolderSearch(tmp_path / "empty")


def test_what_cannot_be_read_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def guarded(path: Any, *given: Any, **more: Any) -> Any:
        if str(path).endswith("trip.txt"):
            raise PermissionError(13, "Permission denied")
        return real(path, *given, **more)

    monkeypatch.setattr(folder_index_module, "open", guarded, raising=False)
    index = FolderIndex(folder, refresh_seconds=0.0)
    assert index.last_update.skipped == {"unreadable": 1}
    assert paths(index, "vienna") == []
    monkeypatch.undo()
    assert paths(index, "vienna") == ["trip.txt"]


def test_a_folder_may_change_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_index_module._read_text

    def meddling(path: Path) -> tuple[str | None, str]:
        if path.name == "bread.md":
            path.unlink()
        text = real(path)
        if path.name == "trip.txt":
            path.write_text("Now it is all about Corfu and ferries.")
        return text

    with monkeypatch.context() as patch:
        patch.setattr(folder_index_module, "_read_text", meddling)
        index = FolderIndex(folder, refresh_seconds=0.0)
    assert index.last_update.skipped == {"unreadable": 1}
    assert paths(index, "corfu") == ["trip.txt"]
    for each in folder.rglob("*.*"):
        each.unlink()
    assert paths(index, "corfu") == []
    import shutil

    shutil.rmtree(folder)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        index.search("corfu")


def test_a_damaged_or_foreign_index_is_built_anew(folder: Path) -> None:
    file = FolderIndex(folder).file
    for damage in (b"no database at all" * 100, file.read_bytes()[:5000]):
        for part in file.parent.iterdir():
            part.unlink()
        file.write_bytes(damage)
        assert paths(FolderIndex(folder), "vienna") == ["trip.txt"]
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert paths(FolderIndex(folder), "vienna") == ["trip.txt"]


def test_where_it_cannot_be_kept_it_is_made_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert paths(FolderIndex(folder), "vienna") == ["trip.txt"]
    with pytest.raises(OutputError, match="the index cannot be kept in"):
        FolderIndex(folder, file=blocked / "index")


def test_several_threads_may_search(folder: Path) -> None:
    index = FolderIndex(folder, refresh_seconds=0.0)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(paths(index, "vienna"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["trip.txt"]] * 8


def test_the_tool_says_where_it_stands(folder: Path) -> None:
    tool = FolderSearch(folder, num_results=2)
    assert tool("the train") == "[trip.txt] We took the train to Vienna. The hotel had a fine view of the river."
    assert tool("zebra") == "nothing was found"
    assert make_tool("search", search_folder=folder)("storks") == "[deep/er/page.html] Storks & herons"


# The web


class Server:
    """A stand-in for Tavily's server, which answers as it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((dict(self.headers), json.loads(body)))
                outer.answers.pop(0)(self)

            def log_message(self, *given: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/search"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TAVILY_API_KEY", "tvly-key")
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


def says(code: int, body: object, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def sleeps(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.4)


def breaks(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


FOUND = {
    "results": [{"url": "https://a.org", "content": "First\npage " + "x" * 999}, {"url": "b", "content": "second"}]
}


def tavily(server: Server, **options: Any) -> TavilySearch:
    return TavilySearch(url=server.url, pause=0.01, seconds=0.2, **options)


def test_the_web_is_asked_as_tavily_expects_it(server: Server) -> None:
    server.answers = [says(200, FOUND)]
    found = tavily(server)("  who wrote\nthis? ")
    assert found == "[https://a.org] First page " + "x" * 309 + "\n[b] second"
    [(headers, body)] = server.asked
    assert headers["Authorization"] == "Bearer tvly-key"
    assert body == {"query": "who wrote this?", "search_depth": "advanced", "max_results": 4}


@pytest.mark.parametrize("trouble", [says(500, {}), says(429, {}), sleeps, breaks, says(200, b"<html>")])
def test_what_passes_is_tried_again(server: Server, trouble: Callable[[BaseHTTPRequestHandler], None]) -> None:
    server.answers = [trouble, trouble, says(200, {"results": []})]
    assert tavily(server)("x") == "nothing was found"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([says(401, {"detail": "tvly-key is wrong"})], "refuses the key in TAVILY_API_KEY"),
        ([says(403, {})], "refuses the key in TAVILY_API_KEY"),
        ([says(400, {})], "failed: it answers with code 400"),
        ([says(302, {}, Location="http://127.0.0.1:9/")], "failed: it answers with code 302"),
        ([says(503, {})] * 3, "failed: it answers with code 503"),
        ([sleeps] * 3, "failed: no answer within 0.2 s"),
        ([breaks] * 3, "failed: "),
        ([says(200, b"<html>")] * 3, "failed: its answer is no JSON"),
        ([says(200, {"answer": 1})], "not understood"),
        ([says(200, [1])], "not understood"),
    ],
)
def test_what_does_not_pass_is_said(server: Server, answers: list, words: str) -> None:
    server.answers = [*answers]
    with pytest.raises(InputError, match=words) as caught:
        tavily(server)("x")
    assert not server.answers
    assert "tvly-key" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_server_that_is_not_there_is_said(server: Server) -> None:
    server.close()
    with pytest.raises(InputError, match="it cannot be reached"):
        tavily(server)("x")


def test_nothing_is_asked_without_words(server: Server) -> None:
    assert tavily(server)(" \n ") == "nothing was found"
    assert not server.asked


@pytest.mark.parametrize("key", [None, "", "  ", "a\nb", "schlüssel"])
def test_without_a_key_it_is_refused(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("TAVILY_API_KEY", key)
    with pytest.raises(ConfigError, match="TAVILY_API_KEY") as caught:
        TavilySearch()
    assert (key or "nothing").strip() not in str(caught.value).replace("key", "") or not (key or "").strip()


def test_a_folder_goes_before_the_web(server: Server, folder: Path) -> None:
    assert isinstance(make_tool("search", search_folder=folder), FolderSearch)
    assert isinstance(make_tool("search"), TavilySearch)
