// The page: a token, then the list of runs or one run, by the address after #.

const $ = (id) => document.getElementById(id);
const address = (spool, id) => `#/${encodeURIComponent(spool)}/${encodeURIComponent(id)}`;

let agent = null,
  list = null,
  view = null;

function health(sentence, bad) {
  put($("health"), sentence);
  $("health").className = bad ? "bad" : "";
}

// Forget the token, and everything that was read with it.
function leave() {
  location.hash = "";
  location.reload();
}

async function enter(event) {
  event.preventDefault();
  $("login-error").textContent = "";
  const tried = new Agent($("token").value.trim());
  let about;
  try {
    about = await tried.json("");
  } catch (error) {
    $("login-error").textContent =
      error.status === 401
        ? "The agent refuses this token."
        : `The agent does not answer: ${visible(error.message)}`;
    $("token").focus();
    return;
  }
  $("token").value = "";
  agent = tried;
  agent.may = about.right === "run";
  $("agent").textContent = visible(about.host ?? "");
  $("login").hidden = true;
  $("leave").hidden = false;
  $("leave").onclick = leave;
  $("spools").hidden = about.spools.length < 2;
  $("spool").replaceChildren(...about.spools.map((name) => new Option(visible(name), name)));
  const asked = parts()[0];
  agent.spool = about.spools.includes(asked) ? asked : (about.spools[0] ?? "");
  $("spool").value = agent.spool;
  $("spool").onchange = () => {
    agent.spool = $("spool").value;
    location.hash = "#/";
    list.runs = new Map();
    list.open();
  };
  list = new List(agent, health, (status) => view?.show(status));
  if (!agent.spool) {
    health("This agent has no spool yet.", true);
    return;
  }
  list.open();
  show();
}

const parts = () => location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decoded);

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// Show what the address names.
function show() {
  if (!agent) return;
  const [spool, id] = parts();
  const before = view?.id;
  view?.close();
  view = null;
  if (
    id &&
    spool !== agent.spool &&
    [...$("spool").options].some((option) => option.value === spool)
  ) {
    agent.spool = $("spool").value = spool;
    list.open();
  }
  $("runs").hidden = Boolean(id);
  $("run").hidden = !id;
  document.title = id ? `${visible(id)} - chaperone` : "chaperone";
  if (id) {
    view = new RunView(agent, id);
    const known = list.runs.get(id);
    if (known) view.show(known);
    $("run-title").focus();
  } else {
    list.draw();
    const row = [...$("rows").children].find((each) => each.dataset.run === before);
    (row?.querySelector("a") ?? $("text")).focus();
  }
}

$("login-form").addEventListener("submit", enter);
addEventListener("hashchange", show);
$("token").focus();
