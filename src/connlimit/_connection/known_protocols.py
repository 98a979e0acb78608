"""
Kinds of protocols whose clients are there for an answer, known by the names of classes.

A client that waits, has sent something and then closed its direction may want that to be delivered, as
programs that ship logs do, or wanted an answer that it cannot read any more. What is spoken tells which.
Nothing is imported to find out: a class that was not imported is nobody's.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.protocols.policies import ProtocolWrapper

from connlimit.refusals import Preset


@attrs.frozen
class Kind:
    """
    Protocols that answer, or that say the first word and need the client's answer to it.

    :ivar name: what they are called.
    :ivar classes: their protocols and factories, and with them all subclasses.
    :ivar refusals: the refusals in their words.
    """

    name: str
    classes: tuple[str, ...]
    refusals: tuple[str, ...] = ()


#: All that are known.
KINDS = (
    Kind(
        "HTTP",
        (
            "twisted.web.http.HTTPFactory",
            "twisted.web.http.HTTPChannel",
            "twisted.web.http._GenericHTTPChannelProtocol",
        ),
        ("http",),
    ),
    Kind(
        "WebSocket",
        (
            "autobahn.twisted.websocket.WebSocketAdapterFactory",
            "autobahn.twisted.websocket.WebSocketAdapterProtocol",
        ),
    ),
    Kind(
        "SSH and Telnet (conch)",
        (
            "twisted.conch.ssh.factory.SSHFactory",
            "twisted.conch.ssh.transport.SSHTransportBase",
            "twisted.conch.telnet.Telnet",
        ),
        ("ssh",),
    ),
    Kind(
        "mail: SMTP, POP3 and IMAP",
        (
            "twisted.mail.smtp.SMTPFactory",
            "twisted.mail.smtp.SMTP",
            "twisted.mail.pop3.POP3",
            "twisted.mail.imap4.IMAP4Server",
        ),
        ("smtp", "pop3", "imap"),
    ),
    Kind(
        "words: IRC and XMPP",
        (
            "twisted.words.service.IRCFactory",
            "twisted.words.protocols.irc.IRC",
            "twisted.words.xish.xmlstream.XmlStream",
        ),
        ("irc",),
    ),
    Kind("FTP", ("twisted.protocols.ftp.FTPFactory", "twisted.protocols.ftp.FTP"), ("ftp",)),
    Kind("DNS", ("twisted.names.server.DNSServerFactory", "twisted.names.dns.DNSProtocol")),
    Kind("SOCKS", ("twisted.protocols.socks.SOCKSv4",)),
    Kind("NNTP", (), ("nntp",)),
    Kind("MySQL", (), ("mysql",)),
    Kind("PostgreSQL", (), ("postgresql",)),
)

_OF_CLASSES = {name: kind for kind in KINDS for name in kind.classes}
_OF_REFUSALS = {name: kind for kind in KINDS for name in kind.refusals}

#: How many factories or protocols around one another are looked through.
_DEPTH = 20


def kind_of(cls: type) -> Kind | None:
    """
    The kind of a class of protocols or factories; None if it is of none.
    """
    for each in cls.__mro__:
        kind = _OF_CLASSES.get(f"{each.__module__}.{each.__qualname__}")
        if kind is not None:
            return kind
    return None


def factory_answers(factory: Any) -> bool | None:
    """
    Whether a factory's protocols are of a kind that answers, as far as it shows; None if it does not.

    False if they can go on when one direction is closed.
    """
    for _ in range(_DEPTH):
        protocol = _attribute(factory, "protocol")
        if isinstance(protocol, type):
            if IHalfCloseableProtocol.implementedBy(protocol):
                return False
            if kind_of(protocol) is not None:
                return True
        if kind_of(type(factory)) is not None:
            return True
        factory = _attribute(factory, "wrappedFactory")
        if factory is None:
            break
    return None


def protocol_answers(protocol: Any) -> bool | None:
    """
    The same for a protocol.
    """
    if IHalfCloseableProtocol.providedBy(protocol):
        return False
    for _ in range(_DEPTH):
        if kind_of(type(protocol)) is not None:
            return True
        if not isinstance(protocol, ProtocolWrapper):
            break
        protocol = _attribute(protocol, "wrappedProtocol")
    return None


def refusal_answers(refusal: object) -> bool:
    """
    Whether a refusal is in the words of a kind that answers.
    """
    return isinstance(refusal, Preset) and refusal.name in _OF_REFUSALS


def _attribute(of: Any, name: str) -> Any:
    try:
        return getattr(of, name, None)
    except BaseException:  # an application's own property
        return None
