"use strict";
// Plays the videos of each card (.pair) together. Videos near the viewport are loaded, from files or from the page.

const find = (id) => document.getElementById(id);
const APART = 0.06; // seconds of drift between the videos of a pair before one of them jumps

function embedded(id) {
  const bytes = Uint8Array.from(atob(find(id).textContent), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "video/mp4" });
}

class Pair {
  constructor(article) {
    this.article = article;
    this.videos = [...article.querySelectorAll("video")];
    this.button = article.querySelector("button");
    this.time = article.querySelector("input");
    this.playing = false;
    if (!this.videos.length) return;
    for (const video of this.videos) {
      video.dataset.file = video.getAttribute("src") || "";
      video.controls = false;
      video.addEventListener("error", () => (article.querySelector(".media").hidden = true)); // the page was moved
    }
    article.querySelector(".play").hidden = false;
    this.button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.time.addEventListener("input", () => this.seek());
    this.videos[0].addEventListener("ended", () => this.playing && this.restart());
    this.videos[0].addEventListener("timeupdate", () => this.follow());
  }

  load() {
    for (const video of this.videos) {
      if (!video.getAttribute("src")) video.src = video.dataset.file || URL.createObjectURL(embedded(video.dataset.clip));
      video.preload = "auto";
    }
  }

  unload() {
    this.pause();
    for (const video of this.videos) {
      if (!video.getAttribute("src")) continue;
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
}

let pairs = [];
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

function start(all) {
  pairs = all;
  find("all").hidden = false;
  find("all").addEventListener("click", () => playAll(!playing));
  for (const pair of pairs) near.observe(pair.article);
}
