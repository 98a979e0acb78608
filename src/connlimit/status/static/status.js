"use strict";
const main = document.getElementById("main");
const connection = document.getElementById("connection");
function follow() {
  const events = new EventSource("events");
  events.onmessage = (event) => {
    main.innerHTML = JSON.parse(event.data);
    connection.textContent = "live";
  };
  events.onerror = () => {
    connection.textContent = "not connected; trying again";
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, 2000);
  };
}
follow();
