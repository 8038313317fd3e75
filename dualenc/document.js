"use strict";

// Sounds are kept once in the page, as base64, however many players play them.
const sounds = JSON.parse(document.getElementById("sounds").textContent);
const addresses = sounds.map((base64) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "audio/mpeg" }));
});
for (const player of document.querySelectorAll("audio[data-sound]")) {
  player.src = addresses[player.dataset.sound] + (player.dataset.from || "");
}

// One sound at a time.
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) {
    if (player !== event.target) player.pause();
  }
}, true);

// A query is shown while its text holds every word in the filter.
const filter = document.getElementById("filter");
if (filter) {
  const queries = [...document.querySelectorAll(".query")];
  const groups = [...document.querySelectorAll(".group")];
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const query of queries) {
      const text = query.querySelector("summary").textContent.toLowerCase();
      query.hidden = !words.every((word) => text.includes(word));
      shown += !query.hidden;
    }
    for (const group of groups) group.hidden = !group.querySelector(".query:not([hidden])");
    document.getElementById("shown").textContent = `${shown} of ${queries.length} queries shown`;
  });
}
