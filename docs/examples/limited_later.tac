# An echo server, and a page that says that it runs; both know nothing of limits. Run with:
# twistd -n connlimit --max-connections 100 --tac limited_later.tac --skip tcp:8007
from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory
from twisted.protocols.wire import Echo
from twisted.web.server import Site
from twisted.web.static import Data

application = Application("echo")

echo = serverFromString(reactor, "tcp:8006:interface=127.0.0.1")
StreamServerEndpointService(echo, Factory.forProtocol(Echo)).setServiceParent(application)

page = serverFromString(reactor, "tcp:8007:interface=127.0.0.1")
StreamServerEndpointService(page, Site(Data(b"it runs\n", "text/plain"))).setServiceParent(application)
