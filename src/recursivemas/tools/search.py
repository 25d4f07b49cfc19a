"""The tool `search`: over a folder of the user's, or over the web with Tavily.

Both take a few words and give the best passages with where they stand. What they say comes from strangers: it is
escaped like every result, and the model should judge it as such.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any

from recursivemas.errors import ConfigError, InputError
from recursivemas.tools.folder_index import FolderIndex
from recursivemas.tools.tool import Tool

TAVILY_KEY = "TAVILY_API_KEY"
"""The environment variable with the key for Tavily's service."""
TAVILY_URL = "https://api.tavily.com/search"
NOTHING = "nothing was found"
_MAX_ANSWER = 2 * 1024 * 1024


class FolderSearch(Tool):
    """Searches the text files of a folder (see `FolderIndex`)."""

    name = "search"
    description = "a few words to look for; the passages that fit best come back, with the documents they stand in."

    def __init__(self, folder: str | Path | FolderIndex, *, num_results: int = 4, max_calls: int | None = None) -> None:
        """Raises `InputError` if the folder is missing, cannot be read, or holds no text."""
        self.index = folder if isinstance(folder, FolderIndex) else FolderIndex(folder)
        self.num_results = num_results
        self.max_calls = max_calls

    def __call__(self, argument: str) -> str:
        found = self.index.search(argument, self.num_results)
        return _listed([(passage.path, passage.text) for passage in found])


class TavilySearch(Tool):
    """Searches the web with Tavily's service, which needs a key."""

    name = "search"
    description = "a query; passages of the pages of the web that fit best come back."

    def __init__(
        self,
        *,
        url: str = TAVILY_URL,
        num_results: int = 4,
        max_chars: int = 320,
        seconds: float = 10.0,
        num_tries: int = 3,
        pause: float = 0.5,
        max_calls: int | None = None,
    ) -> None:
        """The key is taken from the environment. `seconds` are those of one try; before another there is a pause,
        which doubles. Raises `ConfigError` if there is no key.
        """
        key = os.environ.get(TAVILY_KEY, "").strip()
        if not key:
            raise ConfigError(
                f"searching the web needs a key of Tavily: set {TAVILY_KEY} in the environment; or give a folder of "
                "your own to search (--search-folder)"
            )
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"the key in {TAVILY_KEY} holds characters that no key has")
        self._key = key
        self.url, self.num_results, self.max_chars = url, num_results, max_chars
        self.seconds, self.num_tries, self.pause = seconds, num_tries, pause
        self.max_calls = max_calls
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, argument: str) -> str:
        """Raises `InputError` that says what is wrong, if there is no answer after all tries."""
        query = " ".join(argument.split())[:400]
        if not query:
            return NOTHING
        body = {"query": query, "search_depth": "advanced", "max_results": self.num_results}
        answer = self._ask(json.dumps(body).encode())
        try:
            found = [(str(each["url"]), str(each["content"])) for each in answer["results"][: self.num_results]]
        except (KeyError, TypeError):
            raise InputError("the search service gave an answer that is not understood") from None
        return _listed([(url, content[: self.max_chars]) for url, content in found])

    def _ask(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        trouble = ""
        for attempt in range(self.num_tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            try:
                with self._opener.open(request, timeout=self.seconds) as response:
                    return json.loads(response.read(_MAX_ANSWER))
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (401, 403):
                    raise InputError(f"the search service refuses the key in {TAVILY_KEY}") from None
                trouble = f"it answers with code {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except TimeoutError:
                trouble = f"no answer within {self.seconds:g} s"
            except urllib.error.URLError as error:
                late = isinstance(error.reason, TimeoutError)
                trouble = f"no answer within {self.seconds:g} s" if late else f"it cannot be reached ({error.reason})"
            except (OSError, HTTPException) as error:
                trouble = f"the connection broke ({type(error).__name__})"
            except ValueError:
                trouble = "its answer is no JSON"
        raise InputError(f"the search service failed: {trouble}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the key would go along."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def search_tool(folder: str | Path | None = None, *, max_calls: int | None = None) -> Tool:
    """`search` over a folder if one is given, else over the web if there is a key for it.

    Raises `ConfigError` if there is neither, `InputError` if the folder cannot be searched.
    """
    if folder is not None:
        return FolderSearch(folder, max_calls=max_calls)
    if os.environ.get(TAVILY_KEY, "").strip():
        return TavilySearch(max_calls=max_calls)
    raise ConfigError(
        f"the tool 'search' needs something to search: give a folder (--search-folder DIR), or set {TAVILY_KEY} for "
        "the web"
    )


def _listed(found: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"[{place}] {' '.join(text.split())}" for place, text in found) or NOTHING
