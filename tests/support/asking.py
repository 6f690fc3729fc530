"""Asks a server for the same words, again and again: also as a process, in a network that tests are not in.

``python -m support.asking ADDRESS FOLDER NAME`` connects with the certificates in FOLDER, to a server whose
certificate names NAME, and prints a line of JSON for each round. It ends with an error when a request gets no
answer.
"""

import json
import sys
from pathlib import Path

from unmask.client import Client, ClientTls

__all__ = ["WORDS", "answers"]

WORDS = ("hello", "diffusion", "unmasked")


def answers(client: Client) -> list[list[int]]:
    """Return the tokens that a server has for each of the words."""
    found = [
        client.generate(messages=[{"role": "user", "content": word}], threshold=0.9, max_tokens=24)
        for word in WORDS
    ]
    assert all(one.usage.forwards_denoise > 0 and one.usage.tpf > 0 for one in found)
    return [list(one.token_ids) for one in found]


def main() -> None:
    """Ask until somebody ends this process."""
    address, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    tls = ClientTls(
        ca=folder / "ca.crt", certificate=folder / "tls.crt", key=folder / "tls.key", server_name=name
    )
    with Client(address, tls=tls) as client:
        while True:
            sys.stdout.write(json.dumps(answers(client)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
