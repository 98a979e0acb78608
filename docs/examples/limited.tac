# An echo server behind a limiter, run with: twistd -ny limited.tac
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol

from connlimit import LimitedService, Limiter


class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)


limiter = Limiter(max_connections=100, max_waiting=1000, wait_timeout=30)

application = Application("limited echo")
LimitedService(
    serverFromString(reactor, "tcp:8007:interface=127.0.0.1"),
    Factory.forProtocol(Echo),
    limiter,
    drain_timeout=10,
).setServiceParent(application)
