// Reads {percent: [shares], settings: [objects]}; prints the page's words for them as JSON.

import { readFileSync } from "node:fs";
import { percent, settingsText } from "../../web/js/view.js";

const given = JSON.parse(readFileSync(0, "utf8"));
const settings = given.settings.map((one) => settingsText(one));
console.log(JSON.stringify({ percent: given.percent.map(percent), settings }));
