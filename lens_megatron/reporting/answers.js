// --- the browser of answers: every problem of a benchmark, a page of them at a time

const answers = document.getElementById("answers");
if (answers) {
  const { sets } = JSON.parse(document.getElementById("evaluation").textContent);
  const [which, kind, text] = ["set", "kind", "text"].map((name) => answers.querySelector(`[name=${name}]`));
  const shown = answers.querySelector(".shown");
  const more = answers.querySelector("button");
  const atOnce = 20;
  let found = [];

  const right = (problem) => problem.answers.filter((one) => one.verdict === "correct").length;
  const kinds = [
    ["all", () => true],
    ["none right", (problem) => right(problem) === 0],
    ["some right", (problem) => right(problem) > 0 && right(problem) < problem.answers.length],
    ["all right", (problem) => right(problem) === problem.answers.length],
    ["cut at the limit", (problem) => problem.answers.some((one) => one.finish === "length")],
    ["no answer could be read", (problem) => problem.answers.some((one) => one.verdict === "unparsable")],
  ];
  const choose = (select, labels) => {
    select.replaceChildren(...labels.map((label, place) => {
      const option = make("option", label);
      option.value = place;
      return option;
    }));
    select.value = 0;
  };

  const card = (one, number, of) => {
    const box = make("div", undefined, one.verdict === "correct" ? "rollout success" : "rollout");
    const chips = make("div", undefined, "chips");
    chips.append(make("span", one.verdict, one.verdict === "correct" ? "good" : "bad"));
    const facts = [one.extracted ? `read: ${one.extracted}` : "nothing read", `${one.tokens} tokens`];
    if (of > 1) facts.unshift(`${number + 1} of ${of}`);
    if (one.score > 0 && one.score < 1) facts.push(`score ${short(one.score)}`);
    if (one.note) facts.push(one.note);
    if (one.finish === "length") facts.push("cut at the limit");
    for (const fact of facts) chips.append(make("span", fact));
    box.append(chips, make("pre", one.text || "(empty response)"));
    return box;
  };
  const section = (problem) => {
    const box = make("div", undefined, "problem");
    const chips = make("div", undefined, "chips");
    const count = problem.answers.length;
    chips.append(make("span", problem.id), make("span", `golden answer: ${problem.answer}`));
    chips.append(make("span", `${right(problem)} of ${count} right`, right(problem) ? "good" : "bad"));
    const cards = make("div", undefined, "rollouts");
    cards.append(...problem.answers.map((one, number) => card(one, number, count)));
    box.append(make("div", problem.question, "heatmap"), chips, cards);
    return box;
  };

  const showMore = () => {
    const begin = shown.children.length;
    shown.append(...found.slice(begin, begin + atOnce).map(section));
    more.hidden = shown.children.length >= found.length;
  };
  const show = () => {
    const wanted = text.value.toLowerCase();
    const has = (problem) => !wanted || `${problem.id} ${problem.question} ${problem.answer}`.toLowerCase().includes(wanted);
    const { problems } = sets[which.value];
    found = problems.filter((problem) => kinds[kind.value][1](problem) && has(problem));
    answers.querySelector(".count").textContent = `${found.length} of ${problems.length} problems`;
    shown.replaceChildren();
    showMore();
  };
  choose(which, sets.map((one) => `${one.title} (${one.problems.length})`));
  choose(kind, kinds.map(([name]) => name));
  for (const control of [which, kind]) control.addEventListener("change", show);
  text.addEventListener("input", show);
  more.addEventListener("click", showMore);
  show();
  document.documentElement.dataset.answers = "yes";
}
