"use strict";
// Sorts, filters and plays a comparison's videos. The page embeds the files; videos near the viewport are decoded.

const find = (id) => document.getElementById(id);
const signed = (value, decimals) => (value < 0 ? "" : "+") + value.toFixed(decimals);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const APART = 0.06; // seconds of drift between the videos of a pair before one of them jumps

class Pair {
  constructor(article) {
    this.article = article;
    this.row = Number(article.dataset.row);
    this.tags = JSON.parse(article.dataset.tags);
    this.means = JSON.parse(article.dataset.means);
    this.apart = JSON.parse(article.dataset.apart);
    this.prompt = article.querySelector(".prompt").textContent;
    this.videos = [...article.querySelectorAll("video")];
    this.button = article.querySelector("button");
    this.time = article.querySelector("input");
    this.playing = false;
    if (!this.videos.length) return;
    article.querySelector(".play").hidden = false;
    this.button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.time.addEventListener("input", () => this.seek());
    this.videos[0].addEventListener("ended", () => this.playing && this.restart());
    this.videos[0].addEventListener("timeupdate", () => this.follow());
  }

  load() {
    for (const video of this.videos) {
      if (video.src) continue;
      const bytes = Uint8Array.from(atob(find(video.dataset.clip).textContent), (character) => character.charCodeAt(0));
      video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    }
  }

  unload() {
    this.pause();
    for (const video of this.videos) {
      if (!video.src) continue;
      URL.revokeObjectURL(video.src);
      video.removeAttribute("src");
      video.load(); // releases the decoder, of which browsers have few
    }
  }

  play() {
    if (!this.videos.length) return;
    this.load();
    this.playing = true;
    this.button.firstChild.data = "Pause";
    for (const video of this.videos) video.play().catch(() => {}); // a pause may interrupt the start
  }

  pause() {
    if (!this.videos.length) return;
    this.playing = false;
    this.button.firstChild.data = "Play";
    for (const video of this.videos) video.pause();
  }

  restart() {
    for (const video of this.videos) {
      video.currentTime = 0;
      video.play().catch(() => {});
    }
  }

  seek() {
    this.pause();
    this.load();
    const share = Number(this.time.value);
    for (const video of this.videos) {
      const go = () => (video.currentTime = share * video.duration);
      if (video.readyState) go();
      else video.addEventListener("loadedmetadata", go, { once: true });
    }
  }

  follow() {
    const [first, ...others] = this.videos;
    if (this.playing) this.time.value = first.currentTime / first.duration || 0;
    for (const video of others) {
      if (Math.abs(video.currentTime - first.currentTime) > APART) video.currentTime = first.currentTime;
    }
  }

  describe(candidate, measure, decimals) {
    const change = this.means[candidate][measure] - this.means[0][measure];
    const text = this.article.querySelector(".change");
    text.textContent = `${measure} ${signed(change, decimals)} ${change > 0 ? "▲ higher" : change < 0 ? "▼ lower" : "= the same"}`;
    text.className = `score change ${change > 0 ? "rose" : change < 0 ? "fell" : ""}`;
    for (const value of this.article.querySelectorAll(".value")) {
      value.textContent = `${measure} ${this.means[value.dataset.model][measure].toFixed(decimals)}`;
    }
    return change;
  }
}

const pairs = [...document.querySelectorAll(".pair")].map((article) => new Pair(article));
const seen = new Set();
let playing = false;

const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const pair = pairs.find((one) => one.article === target);
      if (isIntersecting) {
        seen.add(pair);
        pair.load();
        if (playing) pair.play();
      } else {
        seen.delete(pair);
        pair.unload();
      }
    }
  },
  { rootMargin: "200px" },
);

function playAll(on) {
  playing = on;
  find("all").setAttribute("aria-pressed", String(on));
  find("all").textContent = on ? "Pause all" : "Play all";
  for (const pair of seen) on ? pair.play() : pair.pause();
}

function show() {
  const candidate = Number(find("candidate").value);
  const measure = find("measure").value;
  const decimals = Number(find("measure").selectedOptions[0].dataset.decimals);
  const words = find("words").value.trim().toLowerCase();
  const tag = find("tag").value;
  const changes = new Map(pairs.map((pair) => [pair, pair.describe(candidate, measure, decimals)]));
  const orders = {
    win: (a, b) => changes.get(b) - changes.get(a),
    loss: (a, b) => changes.get(a) - changes.get(b),
    apart: (a, b) => b.apart[candidate - 1] - a.apart[candidate - 1],
    prompt: (a, b) => a.row - b.row,
  };
  const order = orders[find("order").value];
  let count = 0;
  for (const pair of [...pairs].sort((a, b) => order(a, b) || a.row - b.row)) {
    pair.article.hidden = (tag && !pair.tags.includes(tag)) || !pair.prompt.toLowerCase().includes(words);
    count += !pair.article.hidden;
    find("pairs").append(pair.article);
  }
  find("count").textContent = `${count} of ${pairs.length} prompts shown`;
}

if (pairs.length) {
  find("tools").hidden = false;
  find("without").hidden = true;
  find("tools").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["candidate", "measure", "order", "tag", "words"]) find(id).addEventListener("input", show);
  find("all").addEventListener("click", () => playAll(!playing));
  for (const pair of pairs) near.observe(pair.article);
  show();
  if (!still.matches) playAll(true);
}
