"""What the index of a folder costs: built, opened again, brought up to date, and asked.

    python benchmarks/search.py [--documents 10000] [--words 200] [--queries 500]

The documents are random words with the frequencies of natural text (Zipf), and one word of each is found nowhere else.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from recursivemas.tools.folder_index import FolderIndex


def write_documents(folder: Path, num_documents: int, num_words: int, rng: np.random.Generator) -> None:
    vocabulary = np.array(["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(3, 10))) for _ in range(30_000)])
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    for number in range(num_documents):
        words = rng.choice(vocabulary, num_words, p=weights / weights.sum())
        place = folder / f"{number // 500:03}"
        place.mkdir(exist_ok=True)
        (place / f"{number:06}.txt").write_text(" ".join([*words[:-1], f"only{number}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=200, help="words of each document")
    parser.add_argument("--queries", type=int, default=500)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    found: dict[str, object] = dict(vars(given))
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary, "documents"), Path(temporary, "index.sqlite")
        folder.mkdir()
        write_documents(folder, given.documents, given.words, rng)

        def timed(name: str) -> FolderIndex:
            wall, cpu = time.perf_counter(), time.process_time()
            index = FolderIndex(folder, file=file, refresh_seconds=3600.0)
            found[name] = {
                "wall_s": round(time.perf_counter() - wall, 3),
                "cpu_s": round(time.process_time() - cpu, 3),
                "files_read": index.last_update.num_read,
            }
            return index

        timed("build").close()
        found["text_mb"] = round(sum(each.stat().st_size for each in folder.rglob("*.txt")) / 1e6, 1)
        found["index_mb"] = round(sum(each.stat().st_size for each in file.parent.glob("index.sqlite*")) / 1e6, 1)
        timed("open_again").close()
        for number in range(100):
            path = folder / f"{number % 10:03}" / f"{(number % 10) * 500 + number:06}.txt"
            path.write_text(path.read_text() + f" new{number}")
        index = timed("update_100_changed")
        milliseconds, hits = [], 0
        numbers = rng.integers(0, given.documents, given.queries)
        words = (folder / "000" / "000499.txt").read_text().split()
        for number in numbers:
            query = f"{' '.join(rng.choice(words, 4))} only{number}"
            begin = time.perf_counter()
            passages = index.search(query)
            milliseconds.append(1000 * (time.perf_counter() - begin))
            hits += any(passage.path.endswith(f"{number:06}.txt") for passage in passages)
        index.close()
    found["query_ms"] = {
        "median": round(statistics.median(milliseconds), 2),
        "95%": round(float(np.quantile(milliseconds, 0.95)), 2),
    }
    found["document_among_first_four"] = round(hits / given.queries, 4)
    found["cpus"] = os.cpu_count()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
