"use strict";

// Sounds are kept once in the page, as base64, however many players play them; what the page does
// not hold is a link to its file. A player gets its sound when its query is opened.
const sounds = JSON.parse(document.getElementById("sounds").textContent);
const addresses = [];
const address = (number) => addresses[number] ??= URL.createObjectURL(new Blob(
  [Uint8Array.from(atob(sounds[number]), (character) => character.charCodeAt(0))],
  { type: "audio/mpeg" },
));
document.addEventListener("toggle", (event) => {
  for (const player of event.target.querySelectorAll("audio:not([src])")) {
    player.src = player.dataset.link ?? address(player.dataset.sound);
  }
}, true);

// One sound at a time.
const players = document.querySelectorAll("audio");
document.addEventListener("play", (event) => {
  for (const player of players) if (player !== event.target) player.pause();
}, true);

// A query is shown while its caption holds every word in the filter.
const filter = document.getElementById("filter");
const queries = [...document.querySelectorAll(".query")];
function show() {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const query of queries) {
    const caption = query.querySelector("summary").firstChild.textContent.toLowerCase();
    query.hidden = !words.every((word) => caption.includes(word));
  }
  for (const group of document.querySelectorAll(".group")) {
    group.hidden = !group.querySelector(".query:not([hidden])");
  }
  const shown = queries.filter((query) => !query.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${queries.length} queries shown`;
}
filter.addEventListener("input", show);
show();
