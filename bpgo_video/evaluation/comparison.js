// Sorts and filters the videos of a comparison, which the page embeds; follows player.js.

const signed = (value, decimals) => (value < 0 ? "" : "+") + value.toFixed(decimals);
const still = matchMedia("(prefers-reduced-motion: reduce)");

class Card extends Pair {
  constructor(article) {
    super(article);
    this.row = Number(article.dataset.row);
    this.tags = JSON.parse(article.dataset.tags);
    this.means = JSON.parse(article.dataset.means);
    this.apart = JSON.parse(article.dataset.apart);
    this.prompt = article.querySelector(".prompt").textContent;
  }

  describe(candidate, measure, decimals) {
    const change = this.means[candidate][measure] - this.means[0][measure];
    const text = this.article.querySelector(".change");
    text.textContent = `${measure} ${signed(change, decimals)} ${change > 0 ? "▲ higher" : change < 0 ? "▼ lower" : "= the same"}`;
    for (const value of this.article.querySelectorAll(".value")) {
      value.textContent = `${measure} ${this.means[value.dataset.model][measure].toFixed(decimals)}`;
    }
    return change;
  }
}

const cards = [...document.querySelectorAll(".pair")].map((article) => new Card(article));

function show() {
  const candidate = Number(find("candidate").value);
  const measure = find("measure").value;
  const decimals = Number(find("measure").selectedOptions[0].dataset.decimals);
  const words = find("words").value.trim().toLowerCase();
  const tag = find("tag").value;
  const changes = new Map(cards.map((pair) => [pair, pair.describe(candidate, measure, decimals)]));
  const orders = {
    win: (a, b) => changes.get(b) - changes.get(a),
    loss: (a, b) => changes.get(a) - changes.get(b),
    apart: (a, b) => b.apart[candidate - 1] - a.apart[candidate - 1],
    prompt: (a, b) => a.row - b.row,
  };
  const order = orders[find("order").value];
  let count = 0;
  for (const pair of [...cards].sort((a, b) => order(a, b) || a.row - b.row)) {
    pair.article.hidden = (tag && !pair.tags.includes(tag)) || !pair.prompt.toLowerCase().includes(words);
    count += !pair.article.hidden;
    find("pairs").append(pair.article);
  }
  find("count").textContent = `${count} of ${cards.length} prompts shown`;
}

if (cards.length) {
  find("tools").hidden = false;
  find("without").hidden = true;
  find("tools").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["candidate", "measure", "order", "tag", "words"]) find(id).addEventListener("input", show);
  start(cards);
  show();
  if (!still.matches) playAll(true);
}
