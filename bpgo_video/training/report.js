// Plays the report's videos, and reloads the page of an unfinished run; follows player.js.

const cards = [...document.querySelectorAll(".pair")].map((article) => new Pair(article));
if (cards.some((card) => card.videos.length)) start(cards);

const seconds = Number(document.body.dataset.reload);
const inUse = () => cards.some((card) => card.playing) || document.querySelector("details[open]");
if (seconds) setInterval(() => inUse() || location.reload(), 1000 * seconds);
