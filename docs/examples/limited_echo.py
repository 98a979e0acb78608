"""
An echo server that serves two clients at once; the others wait. Run with: python limited_echo.py
"""

import sys

from twisted.internet import endpoints, protocol, task
from twisted.internet.defer import Deferred
from twisted.logger import globalLogBeginner, textFileLogObserver

from connlimit import Limiter, LimitingFactory


class Echo(protocol.Protocol):
    def dataReceived(self, data):
        self.transport.write(data)


factory = protocol.Factory.forProtocol(Echo)


async def main(reactor, where="tcp:8007:interface=127.0.0.1"):
    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stdout)])
    limiter = Limiter(max_connections=2, max_waiting=1000, wait_timeout=30)
    endpoint = endpoints.serverFromString(reactor, where)
    await endpoint.listen(LimitingFactory(factory, limiter))
    await Deferred()  # for ever


if __name__ == "__main__":
    task.react(lambda reactor, *arguments: Deferred.fromCoroutine(main(reactor, *arguments)), sys.argv[1:])
