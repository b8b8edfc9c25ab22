"""The link: what one side sent before it ended arrives at the other."""

from __future__ import annotations

from packhorse.worker.link import Arrived, Child, Link, Start


def test_what_was_sent_arrives_where_the_sender_ended_without_having_read_all() -> None:
    supervisor, restorer = Link.pair()
    restorer.send(Start())
    restorer.send(Arrived((1, 2)))
    supervisor.send(Child(7))
    restorer.close()
    assert supervisor.receive(wait=False) == (Start(), [])
    assert supervisor.receive(wait=False) == (Arrived((1, 2)), [])
    assert supervisor.receive(wait=False) is None
    assert supervisor.receive(wait=False) is None
    supervisor.close()


def test_a_side_that_ended_unread_and_silent_is_the_end_of_the_link() -> None:
    supervisor, restorer = Link.pair()
    supervisor.send(Child(7))
    restorer.close()
    assert supervisor.receive() is None
    supervisor.close()
